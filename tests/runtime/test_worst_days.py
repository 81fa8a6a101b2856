"""What a pipeline does when its process forks or ends, its owner forgets it, its weights are bad or it is flooded."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from runtime import Pipeline
from runtime.bundle import file_entry, load_bundle, write_manifest
from runtime.errors import BundleError, CapacityError, EngineError, InputError, SessionFailedError
from runtime.scheduler import MAX_SWITCHES
from runtime.verify import verdict as verdicts
from tests.runtime import handmade

ROOT = Path(__file__).resolve().parents[2]


def script(
    text: str, bundle: Path, timeout: float = 60, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python code with `bundle` as its argument."""
    return subprocess.run(
        [sys.executable, "-c", text, str(bundle)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


FORKED = """
import os, sys
import numpy as np
from runtime import Pipeline
from runtime.errors import EngineError
pipe = Pipeline.load(sys.argv[1])
text = pipe.manifest.text
session = pipe.session(embedding=np.zeros((text.text_len, text.dim), np.float32))
stream = session.stream()
next(stream)
child = os.fork()
if child == 0:
    for use in (lambda: next(stream), lambda: pipe.session(prompt="a"), lambda: session.set_prompt("b"), session.flush):
        try:
            use()
        except EngineError as error:
            assert "before it forked" in str(error)
        else:
            os._exit(3)
    session.close()
    pipe.close()
    sys.exit(0)
_, status = os.waitpid(child, 0)
assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, status
next(stream)  # the parent goes on
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_of_a_fork_hears_so_at_once_and_can_exit(bundle: Path) -> None:
    result = script(FORKED, bundle)
    assert result.returncode == 0, result.stderr


LEFT_OPEN = """
import sys
import numpy as np
from runtime import Pipeline
pipe = Pipeline.load(sys.argv[1])
text = pipe.manifest.text
session = pipe.session(embedding=np.zeros((text.text_len, text.dim), np.float32))
for chunk in session.stream():
    if chunk.index == 1:
        break
"""


def test_a_script_that_ends_under_a_live_stream_ends_well(bundle: Path) -> None:
    for _ in range(3):
        result = script(LEFT_OPEN, bundle)
        assert (result.returncode, result.stderr) == (0, "")


def test_a_pipeline_that_is_dropped_frees_its_threads_and_engine(bundle: Path) -> None:
    before = threading.active_count()
    pipe = Pipeline.load(bundle)
    engine = weakref.ref(pipe.engine)
    text = pipe.manifest.text
    stream = pipe.session(embedding=np.zeros((text.text_len, text.dim))).stream()
    assert threading.active_count() == before + 2
    del pipe
    gc.collect()
    assert len(next(stream).frames)  # the stream keeps what it needs
    del stream
    gc.collect()
    until = time.monotonic() + 20  # a worker may be the one that collects, and ends a moment later
    while engine() is not None and time.monotonic() < until:
        time.sleep(0.01)
        gc.collect()
    assert engine() is None
    assert threading.active_count() == before


def test_a_session_that_is_dropped_gives_its_place_to_the_next(bundle: Path) -> None:
    with Pipeline.load(bundle, sessions=2) as pipe:
        text = pipe.manifest.text
        embedding = np.zeros((text.text_len, text.dim), np.float32)
        kept = pipe.session(embedding=embedding)
        for _ in range(3):
            stream = pipe.session(embedding=embedding).stream()  # the stream keeps its session
            next(stream)
            gc.collect()
            assert pipe.health().open == 2
            with pytest.raises(CapacityError):
                pipe.session(embedding=embedding)
            del stream
            gc.collect()
            assert pipe.health().open == 1
        stream = kept.stream()
        assert [next(stream).index for _ in range(3)] == [0, 1, 2]
        with pipe.session(embedding=embedding) as session:
            session.close()
        del session
        gc.collect()
        assert pipe.health().open == 1, "closed and dropped is one place, not two"
        pipe.session(embedding=embedding)  # forgotten at once
        assert pipe.session(embedding=embedding).index == 0


def test_switches_that_are_superseded_are_dropped_and_their_number_is_bounded(bundle: Path) -> None:
    with Pipeline.load(bundle) as pipe:
        text = pipe.manifest.text
        embedding = np.zeros((text.text_len, text.dim), np.float32)
        session = pipe.session(embedding=embedding)
        for _ in range(100):
            session.set_prompt(embedding=embedding)
            session.set_prompt(embedding=embedding, at=7)
        assert len(session._lane.switches) == 2
        for chunk in range(8, 6 + MAX_SWITCHES):
            session.set_prompt(embedding=embedding, at=chunk)
        with pytest.raises(InputError, match=f"at most {MAX_SWITCHES}"):
            session.set_prompt(embedding=embedding, at=10**6)
        session.set_prompt(embedding=embedding, at=7)  # in place of one that waits


def with_encoder(bundle: Path, folder: Path, tensor: str, rows: slice, value: float) -> Path:
    """A copy with `value` in rows of a tensor of its text encoder, with hashes that are right."""
    shutil.copytree(bundle, folder)
    manifest = load_bundle(folder).manifest
    path = folder / manifest.text.weights
    weights = load_file(path)
    weights[tensor][rows] = value
    save_file(weights, path)
    files = tuple(
        file_entry(folder, entry.path) if entry.path == manifest.text.weights else entry
        for entry in manifest.files
    )
    write_manifest(folder, manifest.model_copy(update={"files": files}))
    return folder


def test_a_prompt_whose_embedding_is_not_finite_is_refused_and_the_session_goes_on(
    bundle: Path, tmp_path: Path
) -> None:
    broken = with_encoder(bundle, tmp_path / "broken", "norm", slice(None), float("nan"))
    with Pipeline.load(broken) as pipe:
        text = pipe.manifest.text
        with pipe.session(embedding=np.zeros((text.text_len, text.dim), np.float32)) as session:
            with pytest.raises(EngineError, match="not finite for this prompt"):
                session.set_prompt("a fox")
            assert len(next(session.stream()).frames)


def test_a_word_whose_row_is_damaged_spoils_no_prompt_without_it(bundle: Path, tmp_path: Path) -> None:
    row = handmade.VOCAB.index("fox")
    broken = with_encoder(bundle, tmp_path / "broken", "token_embedding", slice(row, row + 1), float("nan"))

    def frames(folder: Path, *, ask: bool) -> list[np.ndarray]:
        with Pipeline.load(folder) as pipe, pipe.session("a red", seed=7) as session:
            stream = session.stream()
            found = [next(stream).frames]
            if ask:
                with pytest.raises(EngineError, match="not finite for this prompt"):
                    session.set_prompt("a red fox")
                with pytest.raises(EngineError, match="not finite for this prompt"):
                    pipe.embed("fox")
            return [*found, next(stream).frames]

    for spoilt, whole in zip(frames(broken, ask=True), frames(bundle, ask=False), strict=True):
        assert np.array_equal(spoilt, whole)


def test_a_latent_that_is_not_finite_ends_the_session_at_its_chunk(tiny_bundle: Path) -> None:
    with Pipeline.load(tiny_bundle, sessions=2) as pipe:
        text = pipe.manifest.text
        good = np.zeros((text.text_len, text.dim), np.float32)
        huge = np.full_like(good, 3e38)  # finite, and overflows in the first product
        with pipe.session(embedding=good) as session, pipe.session(embedding=good) as other:
            stream = session.stream(ahead=0)
            assert next(stream).index == 0
            at = session.set_prompt(embedding=huge, recache="none")
            with pytest.raises(SessionFailedError, match=f"chunk {at} failed: .* not finite"):
                for chunk in stream:
                    assert chunk.index < at
            assert session.state == "failed"
            assert next(other.stream()).index == 0
        with pipe.session(embedding=good) as session:
            assert next(session.stream()).index == 0


def test_a_verdict_that_cannot_be_recorded_is_still_given(
    golden_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.host.runner import HostRunner

    folder = tmp_path / "bundle"
    shutil.copytree(golden_bundle, folder, ignore=shutil.ignore_patterns(verdicts.VERDICT_NAME))
    (folder / verdicts.VERDICT_NAME).mkdir()  # as good as a folder that cannot be written, for root too
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    loaded = load_bundle(folder)
    runner = HostRunner(loaded, threads=1)
    verdict = verdicts.judge(loaded, runner)
    with pytest.warns(UserWarning, match="cannot be recorded"):
        assert verdicts.record(loaded, verdict) is None
    assert verdicts.find_verdict(loaded, runner.platform) is None


@pytest.mark.parametrize("home", [{"HOME": "/"}, {}])
def test_a_user_without_a_home_hears_the_verdict(
    golden_bundle: Path, tmp_path: Path, home: dict[str, str]
) -> None:
    """As in a container that runs as a number of its own and can write nothing."""
    folder = tmp_path / "bundle"
    shutil.copytree(golden_bundle, folder, ignore=shutil.ignore_patterns(verdicts.VERDICT_NAME))
    reads = "+dac_read_search"  # what of this machine only root may read, such as its Python
    identity = ["--reuid", "12345", "--regid", "12345", "--clear-groups", f"--bounding-set=-all,{reads}"]
    prefix = ["setpriv", *identity, f"--inh-caps=-all,{reads}", f"--ambient-caps={reads}"]
    if shutil.which("setpriv") is None or subprocess.run([*prefix, "true"], check=False).returncode:
        pytest.skip("this process may not become another user")
    clean = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", **home}
    result = subprocess.run(
        [*prefix, sys.executable, "-m", "runtime", "verify", str(folder), "--json", "-", "--threads", "1"],
        cwd=ROOT,
        env=clean,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["passed"] is True
    assert "warning: the verdict cannot be recorded" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (folder / verdicts.VERDICT_NAME).exists()


def test_telemetry_of_onnx_runtime_is_off(bundle: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environment = {"HOME": str(home), "XDG_CACHE_HOME": ""}
    code = "import os, sys; os.environ.pop('ORT_DISABLE_TELEMETRY', 0); sys.dont_write_bytecode = True\n"
    result = script(code + LEFT_OPEN, bundle, **environment)
    assert result.returncode == 0, result.stderr
    assert [path for path in home.rglob("*") if path.is_file()] == []


def test_a_tensor_that_a_manifest_leaves_out_or_calls_otherwise_is_an_error(
    bundle: Path, tmp_path: Path
) -> None:
    """Every tensor of every component."""
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    good = (folder / "manifest.json").read_text()
    places = [
        (name, kind, index)
        for name, component in json.loads(good)["components"].items()
        for kind in ("inputs", "outputs")
        for index in range(len(component[kind]))
    ]
    assert len(places) >= 60
    for name, kind, index in places:
        for change in (lambda specs, at: specs.pop(at), lambda specs, at: specs[at].update(name="other")):
            raw = json.loads(good)
            change(raw["components"][name][kind], index)
            (folder / "manifest.json").write_text(json.dumps(raw))
            with pytest.raises((BundleError, EngineError)), Pipeline.load(folder, threads=1, warmup=False):
                pass
