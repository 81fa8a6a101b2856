"""Segmented execution: the cut step computes what the whole one computes, and weights are data."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file, save_file

from export.compare.against_reference import against_reference
from export.graph.segments import write_segments
from export.quantize import ORT_SESSION_CONFIG, choose_formats, linear_names, quantize
from export.request.weights import Weights
from lightforcing_ref.config import PRESETS
from runtime.bundle import Segments, file_entry, load_bundle, write_manifest
from runtime.errors import BundleError
from runtime.host.runner import HostRunner
from runtime.pipeline import Pipeline
from runtime.verify.dry_run import dry_run
from tests.conftest import build

EMBEDDING = np.random.default_rng(4).standard_normal((64, 64), dtype=np.float32)


@pytest.fixture(scope="module")
def segmented_bundle(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("segmented"), "short", execution="segmented")


def frames(bundle: Path, chunks: int = 3) -> np.ndarray:
    with (
        Pipeline.load(bundle, warmup=False) as pipeline,
        pipeline.session(embedding=EMBEDDING, seed=2) as session,
    ):
        return np.concatenate([chunk.frames for chunk in session.stream(chunks=chunks)])


def rewritten(bundle: Path, copy: Path, **changes: object) -> Path:
    """Vouch for the present files of `copy`, a changed copy of `bundle`."""
    manifest = load_bundle(bundle).manifest
    files = tuple(file_entry(copy, entry.path) for entry in manifest.files)
    write_manifest(copy, manifest.model_copy(update={"files": files, **changes}))
    return copy


def test_every_forward_agrees_with_pytorch(segmented_bundle):
    found = against_reference(segmented_bundle, chunks=2, tolerance=1e-6)
    assert found.passed
    rows = {row.name: row for row in found.rows}
    assert (rows["step"].runs, rows["clean"].runs) == (8, 2)


def test_a_forward_runs_by_itself_over_any_pool(segmented_bundle, tiny_bundle):
    """A pool may be smaller than a rollout's or larger than the one before; what unnamed slots hold does not matter."""
    manifest = load_bundle(segmented_bundle).manifest
    cut, whole = (HostRunner(load_bundle(path), threads=1) for path in (segmented_bundle, tiny_bundle))
    rng = np.random.default_rng(3)
    for slots in (4, 18, 40):
        frame_slots = np.full(manifest.cache.max_past_frames, -1, dtype=np.int32)
        frame_slots[:3] = (3, 0, slots - 2)
        integers = {"step": 2, "chunk": 1, "frame_slots": frame_slots}
        inputs = {
            spec.name: np.asarray(integers[spec.name], dtype=np.int32)
            if spec.name in integers
            else rng.standard_normal(
                [slots if dim == "slots" else dim for dim in spec.shape], dtype=np.float32
            )
            for spec in manifest.components["step"].inputs
        }
        for name, value in inputs.items():
            if name.startswith("past_"):
                value[[slot for slot in range(slots) if slot not in frame_slots]] = np.nan
        for name in ("step", "clean"):
            taken = {spec.name: inputs[spec.name] for spec in manifest.components[name].inputs}
            found, expected = cut.run(name, taken), whole.run(name, taken)
            assert found.keys() == expected.keys()
            for output, array in expected.items():
                np.testing.assert_allclose(found[output], array, atol=1e-4, err_msg=f"{name} {output}")


def test_the_rollout_equals_that_of_the_whole_graph(segmented_bundle, tiny_bundle):
    cut, whole = frames(segmented_bundle), frames(tiny_bundle)
    assert np.abs(cut.astype(int) - whole.astype(int)).max() <= 1


def test_the_bundle_holds_one_layer_and_no_weights_in_graphs(segmented_bundle):
    names = {path.name for path in segmented_bundle.iterdir()}
    assert {"first.onnx", "layer.onnx", "last.onnx", "qk_prepare.onnx", "attention.onnx"} <= names
    assert not names & {"step.onnx", "clean.onnx", "step.weights", "segments.json"}
    for name in ("first", "layer", "last"):
        model = onnx.load(segmented_bundle / f"{name}.onnx")
        onnx.checker.check_model(model, full_check=True)
        assert not any(node.domain == "lightforcing" for node in model.graph.node)
        assert all(len(tensor.raw_data) < 1024 for tensor in model.graph.initializer)
    manifest = load_bundle(segmented_bundle).manifest
    assert manifest.components["step"].file is None
    stored = load_file(segmented_bundle / manifest.segments.weights)
    bound = [
        manifest.segments.first,
        *manifest.segments.layers,
        manifest.segments.last,
        *manifest.segments.prepare,
    ]
    assert {tensor for row in bound for tensor in row.values()} == set(stored)


def test_embedded_weights_change_no_bit(segmented_bundle, tmp_path):
    bundle = build(tmp_path, "short", execution="segmented", embedded=True)
    dry_run(load_bundle(bundle))
    manifest = load_bundle(bundle).manifest
    layers = [f"layer.{index}" for index in range(manifest.model.layers - 1)]
    assert "layer" not in manifest.components
    for name in ("first", *layers, "last"):
        taken = {spec.name for spec in manifest.components[name].inputs}
        assert taken <= {"latent", "noise", "step", "x", "attention_out", "cross_k", "cross_v"}
    stored = load_file(bundle / manifest.segments.weights)
    assert set(stored) == {tensor for row in manifest.segments.prepare for tensor in row.values()}
    assert np.array_equal(frames(bundle), frames(segmented_bundle))


@pytest.mark.slow
def test_graphs_do_not_depend_on_the_weights(segmented_bundle, tmp_path):
    other = build(tmp_path, "short", execution="segmented", weights=Weights(PRESETS["tiny"], seed=1))
    hashes = [
        {entry.path: entry.sha256 for entry in load_bundle(path).manifest.files}
        for path in (segmented_bundle, other)
    ]
    for name in ("first.onnx", "layer.onnx", "last.onnx", "qk_prepare.onnx", "attention.onnx"):
        assert hashes[0][name] == hashes[1][name], name
    assert hashes[0]["transformer.safetensors"] != hashes[1]["transformer.safetensors"]


def test_a_lora_is_swapped_in_without_a_build(segmented_bundle, tmp_path):
    """Add B A to one matrix in the weights file; the reference with the same change agrees, the old bundle does not."""
    key = "model.blocks.2.ffn.0.weight"
    swapped = tmp_path / "swapped"
    shutil.copytree(segmented_bundle, swapped)
    weights = load_file(swapped / "transformer.safetensors")
    rng = np.random.default_rng(8)
    rank = 4
    delta = rng.standard_normal((512, rank), dtype=np.float32) @ rng.standard_normal(
        (rank, 128), dtype=np.float32
    )
    weights[key] = weights[key] + 0.05 * delta
    save_file(weights, swapped / "transformer.safetensors")
    rewritten(segmented_bundle, swapped)

    from export.compare.reference import Reference

    manifest = load_bundle(swapped).manifest
    reference = Reference.of(manifest)
    with torch.no_grad():
        reference.model.layers[2].ffn[0].weight += torch.from_numpy(0.05 * delta)
    assert against_reference(swapped, chunks=1, tolerance=1e-5, reference=reference).passed
    assert not against_reference(segmented_bundle, chunks=1, tolerance=1e-5, reference=reference).passed


def test_missing_weights_and_bindings_are_named(segmented_bundle, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(segmented_bundle, copy)
    weights = load_file(copy / "transformer.safetensors")
    del weights["modulation_3"]
    save_file(weights, copy / "transformer.safetensors")
    rewritten(segmented_bundle, copy)
    with pytest.raises(
        BundleError, match=r"'modulation_3', which the weights file 'transformer\.safetensors' does"
    ):
        Pipeline.load(copy)

    manifest = load_bundle(segmented_bundle).manifest
    parts = {name: part for name, part in manifest.components.items() if name != "layer"}
    rewritten(segmented_bundle, copy, components=parts)
    with pytest.raises(BundleError, match=r"lacks the component\(s\) layer"):
        load_bundle(copy)


def quantized_segments(
    step: Path, folder: Path, *, leave_scales: bool, skip: tuple[str, ...] = ()
) -> Segments:
    """The step of `step` in fp8, cut into `folder`, the weights inside."""
    model = ir.load(step)
    quantize(model, choose_formats(linear_names(model), "fp8", skip=skip))
    folder.mkdir()
    _, section = write_segments(folder, model, "scan", embedded=True, leave_scales=leave_scales)
    return section


def run_graph(path: Path, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    for key, value in ORT_SESSION_CONFIG.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(path, options)
    taken = {value.name: feed[value.name] for value in session.get_inputs()}
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, taken), strict=True))


def test_scales_of_a_projection_may_be_left_to_the_operator(tiny_bundle, tmp_path):
    """The same operations in the same order, on the other side of the cut: not a bit differs."""
    manifest, rng = load_bundle(tiny_bundle).manifest, np.random.default_rng(6)
    shapes = {spec.name: spec.shape for spec in manifest.components["step"].inputs}
    feed = {
        "latent": rng.standard_normal(shapes["latent"], dtype=np.float32),
        "step": np.array(1, dtype=np.int32),
    }
    angles = rng.standard_normal(shapes["rope_cos"], dtype=np.float32)
    results = []
    for leave_scales in (False, True):
        folder = tmp_path / f"left-{leave_scales}"
        section = quantized_segments(tiny_bundle / "step.onnx", folder, leave_scales=leave_scales)
        projected = run_graph(folder / "first.onnx", feed)
        assert ("qkv_scale" in projected) == leave_scales
        stored = load_file(folder / section.weights)
        given = {name: stored[tensor] for name, tensor in section.prepare[0].items()}
        assert ("channel_scale" in given) == leave_scales
        given |= {
            "qkv": projected["qkv"].reshape(angles.shape[0], -1),
            "cos": np.cos(angles),
            "sin": np.sin(angles),
        }
        if leave_scales:
            given["token_scale"] = projected["qkv_scale"].reshape(-1, 1)
        results.append(run_graph(folder / "qk_prepare.onnx", given))
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        assert np.isfinite(expected).all() and expected.any()
        np.testing.assert_array_equal(results[1][name], expected, err_msg=name)


def test_scales_are_left_to_all_operators_or_none(tiny_bundle, tmp_path):
    """Kernels are chosen for the whole bundle."""
    skip = ("blocks.1.self_attn.qkv",)
    section = quantized_segments(tiny_bundle / "step.onnx", tmp_path / "cut", leave_scales=True, skip=skip)
    assert not any("channel_scale" in weights for weights in section.prepare)
    first = onnx.load(tmp_path / "cut" / "first.onnx", load_external_data=False)
    assert "qkv_scale" not in {value.name for value in first.graph.output}
