"""One bundle against another: whole and segmented, a changed weight, and what cannot be compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from safetensors import numpy as safetensors

from export.cli.main import main
from export.compare.against_bundle import against_bundle
from export.compare.reference import synthetic_feeds
from export.errors import ComparisonError
from export.graph.components import component_of
from export.graph.segments import write_segments
from runtime.bundle import Target, file_entry, load_bundle, write_manifest

SEGMENTS = ("first", "layer", "last", "qk_prepare", "attention")


@pytest.fixture(scope="module")
def segmented(tiny_bundle, tmp_path_factory) -> Path:
    """The same bundle with its step cut into segments."""
    copy = tmp_path_factory.mktemp("segmented") / "segmented"
    shutil.copytree(tiny_bundle, copy)
    files, section = write_segments(copy, ir.load(tiny_bundle / "step.onnx"), "scan")
    for file in copy.glob("step*"):
        file.unlink()
    (copy / "clean.onnx").unlink()
    manifest = load_bundle(tiny_bundle, verify=False).manifest
    components = {
        name: component.model_copy(update={"file": None} if name in ("step", "clean") else {})
        for name, component in manifest.components.items()
        if not name.startswith("step_chunk")
    }
    components |= {name: component_of(copy, f"{name}.onnx") for name in SEGMENTS}
    kept = [entry for entry in manifest.files if (copy / entry.path).exists()]
    changes = {
        "name": "segmented",
        "segments": section,
        "components": components,
        "files": (*kept, *(file_entry(copy, name) for name in files)),
    }
    write_manifest(copy, manifest.model_copy(update=changes))
    return copy


def test_segmented_equals_whole(tiny_bundle, segmented, tmp_path):
    comparison = against_bundle(segmented, tiny_bundle, chunks=2, tolerance=1e-6)
    assert comparison.passed, comparison.rows
    assert [(row.scope, row.name, row.runs) for row in comparison.rows] == [
        ("step", "step", 8),
        ("step", "clean", 2),
        ("rollout", "2 chunks", 1),
    ]
    assert comparison.facts["execution"] == "segmented"
    assert comparison.facts["reference: execution"] == "whole"
    assert [film.frames.shape for film in comparison.films] == [(21, 128, 128, 3)] * 2
    steps, layers = comparison.plots
    assert steps.labels == ("0.0", "0.1", "0.2", "0.3", "1.0", "1.1", "1.2", "1.3")
    assert [series.name for series in layers.series] == ["keys", "values"]


def test_a_changed_weight_is_found_in_its_layer(tiny_bundle, segmented, tmp_path, capsys):
    changed = tmp_path / "changed"
    shutil.copytree(segmented, changed)
    manifest = load_bundle(changed, verify=False).manifest
    weights = changed / manifest.segments.weights
    tensors = safetensors.load_file(weights)
    tensors["model.blocks.3.self_attn.qkv.weight"] = tensors["model.blocks.3.self_attn.qkv.weight"] * 1.01
    safetensors.save_file(tensors, weights)
    files = tuple(file_entry(changed, entry.path) for entry in manifest.files)
    write_manifest(changed, manifest.model_copy(update={"files": files, "name": "changed"}))
    report, table = tmp_path / "report.html", tmp_path / "table.json"
    command = ["compare", str(changed), "--with", str(tiny_bundle), "--chunks", "1"]
    assert main([*command, "--report", str(report), "--json", str(table)]) == 1
    assert "FAIL" in capsys.readouterr().out
    document = json.loads(table.read_text())
    _, layers = document["plots"]
    values = next(series["values"] for series in layers["series"] if series["name"] == "values")
    assert max(values[:3]) < 1e-6
    assert values[3] == pytest.approx(0.01, rel=0.1)
    assert "past their tolerance" in report.read_text()


def test_states_are_drawn_without_a_model(tiny_long_bundle):
    manifest = load_bundle(tiny_long_bundle, verify=False).manifest
    feeds = list(synthetic_feeds(manifest, 5))
    assert [(chunk, step) for chunk, step, _ in feeds] == [(c, s) for c in range(5) for s in range(5)]
    for chunk, _, feed in feeds:
        slots = feed["frame_slots"]
        resident = slots[slots >= 0]
        assert len(resident) == min(3 * chunk, 9)
        pool = feed["past_k.2"]
        assert np.isfinite(pool[resident]).all()
        assert np.isnan(np.delete(pool, resident, axis=0)).all()
        block = manifest.attention.block_k
        means = pool[resident][:, :block].mean(axis=1)
        np.testing.assert_allclose(feed["past_kmean.2"][resident][:, 0], means, rtol=1e-5, atol=1e-6)
    names = {spec.name for spec in manifest.components["step"].inputs}
    assert names == feeds[0][2].keys()


def test_other_models_are_refused(tiny_bundle, tiny_long_bundle, capsys):
    assert main(["compare", str(tiny_bundle), "--with", str(tiny_long_bundle)]) == 2
    error = capsys.readouterr().err
    assert (
        "short and long are different models: attention.keep_frames is 6 in one and 3 in the other" in error
    )
    assert error.count("\n") == 1


def test_engines_for_a_gpu_are_refused(tiny_bundle, tmp_path):
    copy = tmp_path / "gpu"
    shutil.copytree(tiny_bundle, copy)
    manifest = load_bundle(copy, verify=False).manifest
    target = Target(name="rtx5090", compute_capability="12.0")
    write_manifest(copy, manifest.model_copy(update={"target": target, "backend": "tensorrt-rtx"}))
    with pytest.raises(ComparisonError, match=r"tensorrt-rtx engines for rtx5090, .* --precisions"):
        against_bundle(copy, tiny_bundle)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--with a --precisions fp8", "not allowed with argument"),
        ("--precisions fp32", "'fp32' is none of bf16, fp8, nvfp4; float32 is what they are compared with"),
        ("--precisions fp8,fp8", "fp8,fp8 names a precision twice"),
        ("--precisions fp8,", "'' is none of bf16, fp8, nvfp4"),
        ("--report nowhere/page.html", "nowhere/page.html cannot be written: nowhere is no folder"),
        ("--json .", ". cannot be written: it is a folder"),
        ("--with no-such-folder", "no bundle at"),
        ("--precisions bf16", "no bundle at"),
        ("--chunks 0", "0 is too small"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert main(["compare", "missing", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
