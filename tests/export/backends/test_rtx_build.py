"""How builds for an RTX 5090 go on: progress, kills, resuming, and several at once."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from export.build import build_bundle
from runtime.bundle import load_bundle
from runtime.errors import BundleError
from tests.export.backends.rtx_bundles import (
    PARTS,
    Boundary,
    Bundles,
    Shown,
    StopBuildError,
    build_killed,
    build_until,
    finished,
    forget,
    hashes,
    partial,
    request,
)

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra tensorrt-rtx)")
pytest.importorskip("triton", reason="Triton is not installed (extra kernels)")

KILLED = PARTS[1:-1]
"""Each part but the first; the build is killed when it begins."""


@pytest.fixture(scope="module")
def boundaries(tmp_path_factory: pytest.TempPathFactory) -> list[Boundary]:
    """A build that was killed at every boundary between two parts, and resumed each time."""
    return build_killed(tmp_path_factory.mktemp("rtx"), "exported", KILLED)


@pytest.fixture(scope="module")
def bundles(boundaries: list[Boundary]) -> Bundles:
    root = boundaries[0].folder.parent
    return Bundles(root, build_until(request(root, "bf16", name="exported"), "golden vectors"))


# ---- interruptions ----


def test_a_build_killed_at_every_boundary_builds_nothing_twice(boundaries):
    times: dict[str, int] = {}
    for done, boundary in enumerate(boundaries, start=1):
        assert boundary.signal == signal.SIGKILL
        assert tuple(boundary.parts) == PARTS[:done]
        assert times.items() <= boundary.times.items()
        assert set(boundary.times) - set(times) == set(boundary.parts[PARTS[done - 1]])
        times = boundary.times
    with pytest.raises(BundleError):
        load_bundle(boundaries[-1].folder)


def test_what_was_killed_everywhere_becomes_the_bundle_that_is_built_at_once(bundles):
    resumed = build_bundle(bundles.start(request(bundles.root / "resumed", "bf16")))
    at_once = bundles.start(request(bundles.root / "at once", "bf16"))
    forget(partial(at_once), *PARTS[5:-2])
    assert hashes(resumed) == hashes(build_bundle(at_once))


def test_a_process_killed_inside_an_engine_leaves_nothing_half_made(bundles, tmp_path):
    wanted = bundles.start(request(tmp_path, "bf16"))
    forget(partial(wanted), *PARTS[7:-2])
    (killed,) = build_killed(tmp_path, wanted.name, ["engine conditioner: Building engine"])
    assert killed.signal == signal.SIGKILL
    assert tuple(killed.parts) == PARTS[:10]
    begun: list[str] = []
    result = build_bundle(wanted, lambda name, done, total: begun.append(name))
    assert tuple(name for name in begun if name in PARTS) == PARTS
    load_bundle(result)
    kept = {path: time for path, time in killed.times.items() if (result / path).exists()}
    assert "layer.engine" in kept
    assert {path: (result / path).stat().st_mtime_ns for path in kept} == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".{wanted.name}.lock", wanted.name]


def test_two_builds_into_one_folder_at_once(bundles, tmp_path):
    """In processes of their own; of the same bundle, the second is refused (tests/export/test_build.py)."""
    first = bundles.start(request(tmp_path, "bf16", name="one"))
    second = bundles.start(request(tmp_path, "bf16", name="two"))
    forget(partial(first), "engine layer", "engine last")
    forget(partial(second), "engine layer", "engine last")
    command = [sys.executable, "-m", "export", "build", "--gpu", "rtx5090", "--init", "random"]
    command += ["--precision", "bf16", "--out", str(tmp_path), "--name", "two"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        one = build_bundle(first)
        output, _ = process.communicate(timeout=500)
    assert process.returncode == 0
    assert "status: built, not executed" in output
    assert output.index("Memory plan") < output.index("launches")
    assert hashes(one) == hashes(tmp_path / second.name)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".one.lock", ".two.lock", "one", "two"]


def test_half_an_engine_is_not_taken_over(bundles, tmp_path, monkeypatch):
    wanted = bundles.start(request(tmp_path, "bf16"))
    forget(partial(wanted), "engine last", "kernels")

    def interrupted(*arguments: object, **options: object) -> None:
        (partial(wanted) / "last.engine").write_bytes(b"half an engine")
        raise StopBuildError

    with monkeypatch.context() as patch:
        patch.setattr("export.backends.tensorrt_rtx.bundle.build_engine", interrupted)
        with pytest.raises(StopBuildError):
            build_bundle(wanted)
    assert "engine last" not in finished(partial(wanted))
    assert (build_bundle(wanted) / "last.engine").stat().st_size > 10_000


# ---- progress ----


def inside(shown: Shown, part: str, phase: str) -> list[float]:
    """The effort done, of the whole build, whenever a phase of a part was shown."""
    return [done for name, done, _ in shown if name == f"{part}: {phase}"]


@pytest.fixture(scope="module")
def shown(bundles: Bundles) -> Shown:
    """The progress of an fp8 build that takes the exported graphs over."""
    steps: Shown = []
    build_bundle(bundles.start(request(bundles.root, "fp8")), lambda *step: steps.append(step))
    return steps


@pytest.mark.parametrize(
    ("part", "phase"),
    [
        ("quantization", "quantizing"),
        ("segments", "quantizing"),
        ("segments", "writing"),
        *((f"engine {name}", "Building engine") for name in ("first", "layer", "last", "conditioner")),
        ("golden vectors", "layer"),
        ("golden vectors", "vae_next"),
    ],
)
def test_progress_reaches_into_the_parts(shown, part, phase):
    before = next(done for name, done, _ in shown if name == part)
    assert max(inside(shown, part, phase)) > before


@pytest.mark.parametrize("part", ["text encoder", "video decoder", "conditioner", "transformer"])
def test_progress_reaches_into_what_is_exported(boundaries, part):
    shown = [name for boundary in boundaries for name in boundary.shown]
    assert f"{part}: writing" in shown


def test_progress_never_goes_back_and_ends_complete(shown):
    shares = [done / total for _, done, total in shown]
    assert shares == sorted(shares)
    name, done, total = shown[-1]
    assert name == "manifest" and done == total


def test_parts_that_are_taken_over_are_no_effort(shown):
    """Else the time left would be that of a build which does everything as fast as it takes parts over."""
    begun = {name: (done, total) for name, done, total in shown if name in PARTS}
    assert begun["quantization"][0] == 0
    assert begun["tokenizer"][1] - begun["quantization"][1] >= 60  # the text encoder's weights, and more
    assert begun["engine vae_first"][1] > begun["engine vae_next"][1]  # the same in every precision
