"""What bf16, fp8 and nvfp4 cost, measured through their twins: figures, command, and agreement with PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from export.cli.main import main
from export.compare.against_precisions import _plan
from export.compare.reference import Reference
from runtime.bundle import load_bundle

ATTENTION = ("self_attn.qkv", "self_attn.o", "cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.o")
LINEARS = (*ATTENTION, "ffn.0", "ffn.2")


@pytest.fixture(scope="module")
def study(tiny_bundle, tmp_path_factory) -> tuple[int, dict, str]:
    """The command on all three precisions: exit code, JSON, page."""
    folder = tmp_path_factory.mktemp("study")
    command = ["compare", str(tiny_bundle), "--precisions", "bf16,fp8,nvfp4", "--chunks", "2"]
    files = ["--json", str(folder / "study.json"), "--report", str(folder / "study.html")]
    code = main([*command, *files])
    return code, json.loads((folder / "study.json").read_text()), (folder / "study.html").read_text()


def rows(document: dict) -> dict[tuple[str, str, str], dict]:
    return {
        (row["scope"], row["name"], "" if row["scope"] == "linear" else row["output"]): row
        for row in document["rows"]
    }


def test_the_command_passes_and_writes(study):
    code, document, page = study
    assert code == 0
    assert document["passed"] is True
    assert document["title"].endswith("bf16, fp8, nvfp4 against float32")
    titles = [plot["title"] for plot in document["plots"]]
    assert titles[:2] == ["fp8: error of each linear's output", "nvfp4: error of each linear's output"]
    for title in titles:
        assert title.replace("'", "&#x27;") in page
    assert page.count("<img ") == 3 * 3 * 4


def test_each_linear_has_its_formats_own_error(study):
    """On Gaussian data a product is off by 0.037 in FP8 and 0.134 in NVFP4."""
    found = rows(study[1])
    for kind in LINEARS:
        assert 0.03 < found["linear", f"fp8: {kind}", ""]["relative"] < 0.042
        assert 0.12 < found["linear", f"nvfp4: {kind}", ""]["relative"] < 0.15


def test_rollouts_lose_more_with_fewer_bits(study):
    found = rows(study[1])
    latents = [found["rollout", precision, "latents"]["relative"] for precision in ("bf16", "fp8", "nvfp4")]
    signal = [found["rollout", precision, "frames"]["psnr"] for precision in ("bf16", "fp8", "nvfp4")]
    assert 0 < latents[0] < latents[1] < latents[2] < 0.05
    assert 100 > signal[0] > signal[1] > signal[2] > 35
    assert found["rollout", "fp8 against bf16", "latents"]["relative"] > 0.003
    steps = [row for row in study[1]["rows"] if row["scope"] == "step"]
    assert [(row["name"], row["runs"]) for row in steps] == [("bf16", 8), ("fp8", 8), ("nvfp4", 8)]


def test_curves_have_a_point_for_everything(study):
    plots = {plot["title"]: plot for plot in study[1]["plots"]}
    linears = plots["nvfp4: error of each linear's output"]
    assert len(linears["labels"]) == 6
    assert [series["name"] for series in linears["series"][-3:]] == [
        "cross_attn.o (nvfp4)",
        "ffn.0 (nvfp4)",
        "ffn.2 (nvfp4)",
    ]
    assert plots["Error of each forward, from equal states"]["labels"][-1] == "1.3"
    assert [series["name"] for series in plots["Error of a rollout's latents"]["series"]] == [
        "bf16",
        "fp8",
        "nvfp4",
    ]
    assert all(
        value is None or 0 <= value < 1
        for plot in plots.values()
        for series in plot["series"]
        for value in series["values"]
    )


@pytest.mark.parametrize("bundle_name", ["tiny_bundle", "tiny_long_bundle"])
def test_the_plan_is_that_of_the_bundle(request, bundle_name):
    path: Path = request.getfixturevalue(bundle_name)
    manifest = load_bundle(path, verify=False).manifest
    plan = _plan(manifest, Reference.of(manifest))
    sections = plan.manifest_sections()
    for name in ("model", "schedule", "attention", "sparsity", "cache"):
        assert sections[name] == getattr(manifest, name)
