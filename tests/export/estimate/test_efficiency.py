"""Predicting with what a bench measured: the file that `bench` writes, and what `plan` makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from export.cli.main import main
from export.errors import InputError
from export.estimate.efficiency import measured
from export.estimate.roofline import ELEMENT_WISE, predict
from export.request.plan import PlanRequest
from export.request.targets import load_target, load_variant
from lightforcing_ref.config import preset
from runtime.bundle.benchmark import read_benchmark
from runtime.cli.main import main as runtime

CHUNKS = 3


@pytest.fixture(scope="module")
def written(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `bench` writes about a bundle that runs here."""
    path = tmp_path_factory.mktemp("bench") / "results.json"
    arguments = ["--chunks", str(CHUNKS), "--warmup-chunks", "1", "--threads", "1", "--json", str(path)]
    assert runtime(["bench", str(tiny_bundle), *arguments]) == 0
    return path


def on_rtx5090(written: Path, folder: Path, **changes: Any) -> Path:
    """The same file as if the bundle had been one for an RTX 5090 in fp8."""
    document = json.loads(written.read_text())
    document["bundle"] |= {
        "target": {"name": "rtx5090", "compute_capability": "12.0"},
        "backend": "tensorrt-rtx",
        "precision": "fp8",
    }
    path = folder / "rtx5090.json"
    path.write_text(json.dumps(document | changes))
    return path


def tiny() -> PlanRequest:
    """What was measured: blocks of 32, as the bundle for this machine has them."""
    model, short = preset("tiny"), load_variant("short").model_copy(update={"block": 32})
    return PlanRequest(load_target("rtx5090"), short, model, model.height, model.width, "fp8")


def chunk(index: int, denoise: float, decode: float) -> dict[str, float]:
    times = {"latency": denoise + decode, "denoise": denoise, "decode": decode, "other": 0.0}
    return {"index": index, "frames": 12 if index else 9, **times}


def test_bench_says_what_it_measured(written: Path, tiny_bundle: Path) -> None:
    found = read_benchmark(written)
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    assert found.bundle.name == manifest["name"]
    assert (found.bundle.target.name, found.bundle.precision) == ("cpu", "fp32")
    assert list(found.bundle.sparsity.values) == manifest["sparsity"]["values"]
    assert [one.index for one in found.chunks] == [1, 2, 3]
    assert found.frames == CHUNKS * 12


def test_what_was_measured_is_predicted_as_it_was(written: Path, tmp_path: Path) -> None:
    """The first clip took 0.5 s, decoding half hidden behind denoising: planned again, that is what it takes."""
    chunks = [chunk(index, 0.05, 0.03) for index in range(7)]
    path = on_rtx5090(written, tmp_path, seconds=0.5, frames=81, chunks=chunks)
    share, clip = measured(path, load_target("rtx5090")), predict(tiny())
    assert clip is not None and share.is_measured
    assert share.seconds(clip) == pytest.approx(0.5)
    assert share.fps(clip) == pytest.approx(81 / 0.5)
    assert share.overlap == pytest.approx(0.5 / (7 * 0.08))
    decoder = sum(clip.part(kind).seconds for kind in ("decoder", ELEMENT_WISE[1]))
    assert share.decoder == pytest.approx(decoder / (7 * 0.03))
    assert share.transformer == pytest.approx((clip.seconds - decoder) / (7 * 0.05))


def test_sessions_share_the_device(written: Path, tmp_path: Path) -> None:
    """Two sessions of the same chunks in twice the time are as far from the floor as one."""
    chunks = [chunk(index, 0.05, 0.03) for index in range(7)]
    one = measured(on_rtx5090(written, tmp_path, seconds=0.5, chunks=chunks), load_target("rtx5090"))
    two = measured(
        on_rtx5090(written, tmp_path, seconds=1.0, sessions=2, chunks=2 * chunks), load_target("rtx5090")
    )
    assert (two.transformer, two.decoder, two.overlap) == pytest.approx(
        (one.transformer, one.decoder, one.overlap)
    )


def test_plan_takes_the_file(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = on_rtx5090(written, tmp_path)
    arguments = ["plan", "--gpu", "rtx5090", "--preset", "wan-1.3b", "--measured", str(path)]
    assert main(arguments) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "ms as measured" in text
    assert f"as far from it as rtx5090.json: {read_benchmark(path).bundle.name}, 3 chunks on" in text
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["prediction"]["at_efficiency"]
    assert found["is_measured"] is True
    assert found["seconds"] == pytest.approx(81 / found["fps"])


def test_a_bench_of_another_gpu_is_refused(written: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bundle for rtx5090, and rtx4090 is planned"):
        measured(on_rtx5090(written, tmp_path), load_target("rtx4090"))
    with pytest.raises(InputError, match="measured in fp32 on cpu, whose peak rates are not known"):
        measured(written, load_target("cpu"))


def test_a_bench_that_contradicts_itself_is_refused(written: Path, tmp_path: Path) -> None:
    path = on_rtx5090(written, tmp_path, chunks=[chunk(1, 0.05, 0.03) | {"frames": 9}])
    with pytest.raises(InputError, match="chunks of 9 frames in all; its model makes 12"):
        measured(path, load_target("rtx5090"))
    path = on_rtx5090(written, tmp_path, chunks=[chunk(1, 0.0, 0.03)])
    with pytest.raises(InputError, match="no time inside the engines"):
        measured(path, load_target("rtx5090"))
    path.write_text('{"frames": 3}')
    with pytest.raises(Exception, match=r"is no benchmark: bundle: Field required; expected a file that"):
        read_benchmark(path)


def test_another_decoder_is_recognised(written: Path, tmp_path: Path) -> None:
    """The floor of what was measured is that of its own decoder, and one that nobody knows is refused."""
    document = json.loads(written.read_text())["bundle"]
    document |= {
        "target": {"name": "rtx5090", "compute_capability": "12.0"},
        "precision": "fp8",
        "vae": document["vae"] | {"kind": "tae", "widths": [256, 128, 64, 64]},
    }
    own = measured(on_rtx5090(written, tmp_path), load_target("rtx5090"))
    other = measured(on_rtx5090(written, tmp_path, bundle=document), load_target("rtx5090"))
    assert other.transformer == pytest.approx(own.transformer)
    assert other.decoder > own.decoder
    document["vae"]["widths"] = [3, 3, 3, 3]
    with pytest.raises(InputError, match="a tae decoder of widths"):
        measured(on_rtx5090(written, tmp_path, bundle=document), load_target("rtx5090"))


def test_the_schedule_is_the_recorded_one(written: Path, tmp_path: Path) -> None:
    """Two forwards and a clean one in place of four and one, whatever the variant is called; the name only of old."""
    document = json.loads(written.read_text())["bundle"]
    document |= {
        "target": {"name": "rtx5090", "compute_capability": "12.0"},
        "precision": "fp8",
        "variant": "mine",
    }
    assert len(document["schedule"]["timesteps"]) == 5

    def share(schedule: dict[str, object] | None) -> float:
        path = on_rtx5090(written, tmp_path, bundle=document | {"schedule": schedule})
        return measured(path, load_target("rtx5090")).transformer

    recorded = share(document["schedule"])
    assert share(None) == pytest.approx(recorded)  # the usual one
    shorter = {**document["schedule"], "timesteps": (1000.0, 937.5, 0.0), "sigmas": (1.0, 0.9375, 0.0)}
    ratio = share(shorter) / recorded
    # The first chunk has no clean forward before it; clean ones end before the last layer does.
    assert 2 / 4 < ratio < 3 / 5
