"""The command `plan`: what it prints, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from export.cli.main import main
from export.errors import InputError
from export.request.plan import planned_precision
from export.request.targets import load_target

ROOT = Path(__file__).resolve().parents[3]


def run(capsys, *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_plan_prints_memory_and_prediction(capsys):
    text = run(
        capsys, "--gpu", "rtx5090", "--preset", "wan-1.3b", "--precision", "fp8", "--efficiency", "0.5"
    )
    for expected in (
        "Memory plan",
        "fits: 1 session needs",
        "PREDICTED floor per chunk (not measured)",
        "51/504",
    ):
        assert expected in text
    for expected in ("Peak rates", "Decoders compared"):
        assert expected in text
    for expected in ("ms at 50%", "27.4 FPS", "33.9 FPS", "Compute-bound in 83%"):
        assert expected in text


def test_plan_as_json(capsys):
    text = run(capsys, "--gpu", "h200", "--preset", "wan-1.3b", "--json")
    document = json.loads(text)
    assert document["prediction"]["predicted"] is True
    assert document["memory"]["fits"] is True
    assert len(document["prediction"]["chunks"]) == 7
    assert set(document["prediction"]["precisions"]) == {"bf16", "fp8"}
    decoders = document["prediction"]["decoders"]
    assert set(decoders) == {"wan", "light", "tae", "light-tae"}
    assert decoders["tae"]["seconds"] < decoders["light"]["seconds"] < decoders["wan"]["seconds"]
    assert decoders["light"]["seconds"] == document["prediction"]["seconds"]


@pytest.mark.parametrize(
    ("variant", "frames", "forwards"),
    [
        # Forwards of chunks 0 and 3 through cross-attention; the clean one lacks the last of 30 layers.
        ("causal-framewise-2step", [1, 4, 4], (4, 2 + 29 / 30)),
        ("causal-framewise-1step", [1, 4, 4], (4, 1 + 29 / 30)),
        ("rolling", [9, 12, 12], (1 + 2 + 3 + 4 + 5, 5 + 29 / 30)),
    ],
)
def test_plan_follows_the_schedule(capsys, variant, frames, forwards):
    common = ("--gpu", "h200", "--preset", "wan-1.3b", "--precision", "bf16", "--variant", variant)
    chunks = json.loads(run(capsys, *common, "--json"))["prediction"]["chunks"]
    assert [chunk["frames"] for chunk in chunks[:3]] == frames
    cross = [chunk["parts"]["cross-attention"]["flops"] for chunk in chunks]
    assert cross[0] / cross[3] == pytest.approx(forwards[0] / forwards[1])
    text = run(capsys, *common)
    assert {"rolling": "5 chunks at once, rolling"}.get(variant, "1 latent frame a chunk") in text


def test_a_rate_that_is_not_known_costs_its_prediction_only(capsys, tmp_path):
    """A target of one's own, with fp8 and no rate for it: the memory plan stays, and so does what bf16 would take."""
    path = tmp_path / "mine.toml"
    path.write_text(
        'schema_version = 1\nname = "mine"\ntitle = "My card"\ncompute_capability = "8.9"\nmemory_gib = 24\n'
        'precisions = ["bf16", "fp8"]\nbackends = ["tensorrt-rtx"]\n'
        '[peak]\nmemory_gb_s = 1000.0\nmemory_source = "mine"\n'
        '[[peak.rates]]\noperands = "bf16"\naccumulator = "fp32"\ntflops = 100.0\nsource = "mine"\n'
    )
    text = run(capsys, "--gpu", str(path), "--preset", "wan-1.3b")
    assert "fits: 1 session needs" in text
    assert "No prediction for My card: a peak rate that fp8 needs is not known" in text
    text = run(capsys, "--gpu", str(path), "--preset", "wan-1.3b", "--precision", "bf16", "--json")
    prediction = json.loads(text)["prediction"]
    assert len(prediction["chunks"]) == 7
    assert set(prediction["precisions"]) == {"bf16"}


def test_longer_clips_show_the_short_one_too(capsys):
    text = run(capsys, "--gpu", "rtx5090", "--preset", "wan-1.3b", "--variant", "long")
    assert "all 81 " in text
    assert "all 249 " in text


def test_a_cpu_has_a_memory_plan_only(capsys):
    text = run(capsys, "--preset", "tiny")
    assert "this machine, available now" in text
    assert "No prediction for ONNX Runtime on the CPU" in text


def test_what_does_not_fit_exits_with_1(capsys):
    assert main(["plan", "--gpu", "rtx5080", "--preset", "wan-1.3b", "--sessions", "9"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("does not fit: 9 sessions need") == 2
    assert "does not fit: 9 sessions need" in text[-200:]  # below all tables, where it is seen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--gpu rtx509", "did you mean rtx5090"),
        ("--preset huge", "unknown preset 'huge'"),
        ("--variant sparse", "unknown variant 'sparse'"),
        ("--gpu a100 --precision fp8", "a100 (sm_80) does not compute in fp8"),
        ("--precision fp16", "unknown precision 'fp16'"),
        ("--sessions 0", "0 is too small"),
        ("--efficiency 0", "0 is outside (0, 1]"),
        ("--efficiency 2", "2 is outside [0, 1)"),
        ("--efficiency 0.5 --measured bench.json", "not allowed with argument"),
        ("--measured nowhere.json", "cannot read nowhere.json: No such file"),
        ("--measured README.md", "README.md is no benchmark"),
        ("--resolution 500x768", "500x768 does not divide by 16"),
        ("--keep-frames 2", "expected at least sink + near = 3"),
        ("--sparsity 0.1 --sparsity-base 0.98", "bring base and target closer together"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert main(["plan", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_default_precisions():
    found = {name: planned_precision(load_target(name), None) for name in ("rtx5090", "h200", "a100", "cpu")}
    assert found == {"rtx5090": "fp8", "h200": "fp8", "a100": "bf16", "cpu": "fp32"}
    with pytest.raises(InputError, match="does not compute in nvfp4"):
        planned_precision(load_target("rtx4090"), "nvfp4")


def test_planning_loads_no_pytorch():
    script = (
        "import sys; from export.cli.main import main; "
        "code = main(['plan', '--gpu', 'rtx5090', '--preset', 'wan-1.3b']); "
        "sys.exit(code or int(bool({'torch', 'onnx', 'onnx_ir'} & sys.modules.keys())))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=False, timeout=180, capture_output=True
    )
    assert result.returncode == 0
