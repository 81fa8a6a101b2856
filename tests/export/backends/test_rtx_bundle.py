"""Bundles of TensorRT-RTX engines for an RTX 5090: built for real, on a machine without one, and read back."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from export.backends.tensorrt_rtx.engine_text import read_engine
from export.build import build_bundle
from export.cli.main import main
from export.errors import BuildError, InputError
from export.estimate.memory import plan_memory
from export.quantize.calibration import Calibration
from export.quantize.decision import block_linear_names
from export.quantize.graph import KINDS
from export.request.weights import Weights
from lightforcing_ref.config import PRESETS
from runtime.bundle import HASHES_NAME, Manifest, load_bundle
from runtime.cli.main import main as runtime_main
from runtime.cuda.engine import load_cuda_engine
from runtime.errors import BundleError, EngineError
from runtime.program.buffers import plan_buffers
from runtime.verify.dry_run import DryRunError, dry_run
from tests.export.backends.rtx_bundles import ENGINES, Bundles, exported, hashes, request

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra tensorrt-rtx)")
pytest.importorskip("triton", reason="Triton is not installed (extra kernels)")

LAYERS, DIM, HEADS = 6, 128, 2
TOKENS, FRAME = 192, 64
NAMES = block_linear_names(LAYERS)
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float4_e2m1": 0.5, "int32": 4}
STORED = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    return Bundles(tmp_path_factory.mktemp("rtx"), exported(tmp_path_factory))


def manifest(folder: Path) -> Manifest:
    return load_bundle(folder).manifest


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Types and shapes of the weights file."""
    with safe_open(folder / "transformer.safetensors", "np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


ALL = [
    ("bf16", "short", {"bf16": 6}),
    ("fp8", "short", {"fp8": 6}),
    ("nvfp4", "short", {"fp4": 6}),
    ("fp8", "long", {"fp8": 6}),
    pytest.param("bf16", "long", {"bf16": 6}, marks=pytest.mark.slow),
    pytest.param("nvfp4", "long", {"fp4": 6}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("precision", "variant", "gemms"), ALL)
def test_the_manifest_says_what_the_engines_plans_say(bundles, precision, variant, gemms):
    folder = bundles.build(precision, variant)
    found = manifest(folder)
    assert (found.backend, found.precision, found.variant) == ("tensorrt-rtx", precision, variant)
    assert found.status == "built, not executed"
    assert found.target.compute_capability == "12.0"
    assert found.library is not None and found.library.name == "tensorrt-rtx"
    assert found.provenance.tools["tensorrt-rtx-cu13"] == found.library.version
    for name in ENGINES:
        component = found.components[name]
        assert component.file == f"{name}.engine" and component.cost is not None
        plan = read_engine(folder / component.file)
        assert plan.architecture == "sm120" and plan.capturable
        assert set(plan.inputs) == {spec.name for spec in component.inputs}
        assert len(plan.outputs) == len(component.outputs)  # a plan may know them by names of its own
        assert component.cost.gemms == plan.gemms
        assert component.cost.launches == len(plan.launches)
        assert component.cost.activation_bytes == plan.activation_bytes
    assert found.components["layer"].cost.gemms == gemms
    files = {path.suffix for path in folder.iterdir() if path.is_file() and path.name != HASHES_NAME}
    assert files == {".engine", ".safetensors", ".json"}


@pytest.mark.parametrize(("precision", "variant", "gemms"), ALL)
def test_every_weight_input_has_its_tensor_in_the_weights_file(bundles, precision, variant, gemms):
    folder = bundles.build(precision, variant)
    found, stored = manifest(folder), tensors(folder)
    segments = found.segments
    assert segments is not None and not segments.embedded
    runs = [("first", segments.first), *(("layer", row) for row in segments.layers), ("last", segments.last)]
    for component, row in runs:
        specs = {spec.name: spec for spec in found.components[component].inputs}
        for name, tensor in row.items():
            dtype, shape = stored[tensor]
            assert (
                np.prod(specs[name].shape) * ITEM_BYTES[specs[name].dtype] == np.prod(shape) * STORED[dtype]
            )
        assert {name for name in specs if name.startswith("weight.")} == set(row)
    for row in segments.prepare:
        scales = set() if precision == "bf16" else {"channel_scale"}
        assert set(row) == {"bias", "norm_q", "norm_k"} | scales
        assert all(stored[tensor][0] == "BF16" for tensor in row.values())
    used = {tensor for _, row in runs for tensor in row.values()}
    assert used | {tensor for row in segments.prepare for tensor in row.values()} == set(stored)


def test_the_manifest_records_order_tensors_and_the_weights_of_each_layer(bundles):
    found = manifest(bundles.build("fp8"))
    segments, parts = found.segments, found.components
    passed = {
        name: (
            {spec.name for spec in parts[name].inputs if not spec.name.startswith("weight.")},
            {spec.name for spec in parts[name].outputs},
        )
        for name in ("first", "layer", "last")
    }
    projected = {"x_out", "qkv", "qkv_scale"}
    assert passed["first"] == ({"latent", "step"}, projected)
    assert passed["layer"] == ({"x", "attention_out", "cross_k", "cross_v", "step"}, projected)
    inputs, outputs = passed["last"]
    assert inputs == {"x", "attention_out", "cross_k", "cross_v", "step", "latent", "noise"}
    assert outputs == {"next_latent", "x0"}

    def layers(row: dict[str, str], kind: str) -> set[str]:
        return {tensor.split(".")[2] for tensor in row.values() if f".{kind}.weight" in tensor}

    assert layers(segments.first, "self_attn.qkv") == {"0"}
    for layer, row in enumerate(segments.layers):
        assert layers(row, "self_attn.o") == layers(row, "ffn.2") == {str(layer)}
        assert layers(row, "self_attn.qkv") == {str(layer + 1)}
    assert len(segments.layers) == LAYERS - 1
    assert layers(segments.last, "self_attn.o") == {str(LAYERS - 1)}
    assert [row["norm_q"].split(".")[2] for row in segments.prepare] == [str(i) for i in range(LAYERS)]


SHORT = [0, 0.827, 0.855, 0.872, 0.883, 0.892, 0.898]
"""Published for 21 frames at a mean of 0.88."""


@pytest.mark.parametrize(
    ("variant", "frames", "window", "past"), [("short", (6, 1, 2), None, 18), ("long", (3, 1, 1), 12, 9)]
)
def test_the_manifest_records_the_attention(bundles, variant, frames, window, past):
    found = manifest(bundles.build("fp8", variant))
    attention, cache = found.attention, found.cache
    assert (attention.block_q, attention.block_k, attention.scale) == (64, 64, 64**-0.5)
    assert (attention.keep_frames, attention.sink_frames, attention.near_frames) == frames
    assert (cache.window_frames, cache.max_past_frames) == (window, past)
    assert len(found.sparsity.keep_q20) == len(found.sparsity.values)
    if variant == "short":
        assert found.sparsity.values == pytest.approx(SHORT, abs=5e-4)
    kept = [round((1 - value) * 2**20) for value in found.sparsity.values]
    assert found.sparsity.keep_q20 == pytest.approx(kept, abs=64)


def embedded(bundles: Bundles) -> Path:
    return bundles.build("fp8", name="embedded", embedded=True, with_encoder=True)


@pytest.mark.parametrize("variant", ["short", "long", "embedded"])
def test_the_dry_run_finds_nothing(bundles, variant):
    folder = embedded(bundles) if variant == "embedded" else bundles.build("fp8", variant)
    report = dry_run(load_bundle(folder), sessions=2)
    denoise = next(cost for cost in report.forwards if cost.name == "denoise.2")
    assert (denoise.engine_runs, denoise.kernel_launches) == (LAYERS + 1, 4 * LAYERS)
    assert report.unbound == ()


def test_the_video_encoder_is_two_engines_with_caches_in_half_precision(bundles):
    components = manifest(embedded(bundles)).components
    for name, frames in (("vae_encode_first", 1), ("vae_encode_next", 4)):
        specs = {spec.name: (spec.dtype, spec.shape) for spec in components[name].inputs}
        assert specs["video"] == ("float32", (frames, 3, 128, 128))
        outputs = {spec.name: (spec.dtype, spec.shape) for spec in components[name].outputs}
        assert outputs["latent"] == ("float32", (16, 1, 16, 16))
        assert {dtype for other, (dtype, _) in outputs.items() if other != "latent"} == {"float16"}


def test_the_dry_run_of_the_command_line_passes(bundles, capsys):
    assert runtime_main(["verify", "--dry-run", str(bundles.build("nvfp4"))]) == 0
    assert "denoise" in capsys.readouterr().out


def test_another_gpu_is_refused(bundles, monkeypatch):
    """Before anything is loaded: all that is asked of the GPU is what it is."""
    h200 = SimpleNamespace(capability=(9, 0), device=SimpleNamespace(name="NVIDIA H200"))
    monkeypatch.setattr("runtime.cuda.engine.CudaDriver", lambda device: h200)
    message = (
        r"was built for rtx5090, compute capability 12\.0, and CUDA device 0 \(NVIDIA H200\) has 9\.0; build"
    )
    bundle = load_bundle(bundles.build("fp8"))
    with pytest.raises(EngineError, match=message):
        load_cuda_engine(bundle, plan_buffers(bundle.manifest, 1))


def test_boundaries_have_the_types_that_the_runtime_counts_on(bundles):
    found = manifest(bundles.build("fp8"))
    parts = found.components

    def types(component: str) -> dict[str, tuple[str, tuple[object, ...]]]:
        specs = (*parts[component].inputs, *parts[component].outputs)
        return {spec.name: (spec.dtype, spec.shape) for spec in specs}

    step = types("step")
    assert parts["step"].file is None and parts["clean"].file is None
    assert step["past_k.5"] == ("bfloat16", ("slots", FRAME, HEADS, 64))
    assert step["past_kmean.0"] == ("float32", ("slots", 1, HEADS, 64))
    assert step["latent"] == step["next_latent"] == ("float32", (16, 3, 16, 16))
    assert step["k.3"][0] == step["cross_v.1"][0] == "bfloat16"
    assert "noise" not in types("clean")
    assert types("conditioner")["text"] == ("float32", (64, 64))
    assert types("conditioner")["cross_k.0"][0] == "bfloat16"
    text = types("text_encoder")
    assert text["hidden"] == text["hidden_out"] == ("float32", (64, 64))
    assert text["mask"] == ("float32", (64,)) and text["gate"][0] == "bfloat16"
    decoder = types("vae_next")
    assert decoder["latent"][0] == "float32" and decoder["frames"] == ("uint8", (4, 128, 128, 3))
    assert {cache.dtype for cache in found.vae.caches} == {"float16"}
    assert all(decoder[cache.name] == ("float16", cache.shape) for cache in found.vae.caches)
    assert parts["attention"].file is None and types("attention")["past_k"][0] == "bfloat16"
    assert parts["qk_prepare"].file is None and types("qk_prepare")["q_mean"][0] == "float32"


def test_only_the_kernels_that_the_bundle_launches_are_in_it(bundles):
    kernels = {}
    for variant in ("short", "long"):
        folder = bundles.build("fp8", variant)
        assert manifest(folder).kernels.arch == "sm_120"
        index = json.loads((folder / "kernels/sm_120/kernels.json").read_text())
        kernels[variant] = {image["kernel"] for image in index["images"]}
        assert len(index["images"]) == len(kernels[variant])
    assert kernels["short"] == {"prepare_scaled", "score", "select", "attend", "commit"}
    assert kernels["long"] == kernels["short"] | {"rope_sink"}


def test_a_scale_of_the_projection_that_nobody_applies_is_found(bundles):
    bundle = load_bundle(bundles.build("fp8"))
    found = bundle.manifest
    prepare = found.components["qk_prepare"]
    inputs = tuple(spec for spec in prepare.inputs if spec.name != "channel_scale")
    parts = {**found.components, "qk_prepare": prepare.model_copy(update={"inputs": inputs})}
    with pytest.raises(DryRunError, match="component 'qk_prepare', input 'channel_scale': it is missing"):
        dry_run(replace(bundle, manifest=found.model_copy(update={"components": parts})))
    rows = tuple({name: row[name] for name in ("bias", "norm_q", "norm_k")} for row in found.segments.prepare)
    unbound = found.segments.model_copy(update={"prepare": rows})
    with pytest.raises(DryRunError, match=r"prepare_scaled.*channel_scale"):
        dry_run(replace(bundle, manifest=found.model_copy(update={"segments": unbound})))


def original() -> dict[str, torch.Tensor]:
    return Weights(PRESETS["tiny"], seed=0).dit(torch.bfloat16).state_dict()


def test_fp8_weights_in_the_file_are_the_models(bundles):
    folder, state = bundles.build("fp8"), original()
    with safe_open(folder / "transformer.safetensors", "pt") as file:
        for name in ("blocks.0.ffn.0", "blocks.5.cross_attn.o"):
            values = file.get_tensor(f"model.{name}.weight.fp8").float()
            post = file.get_tensor(f"model.{name}.weight.post").float()
            expected = state[f"{name}.weight"].float()
            assert values.abs().amax() == 448
            error = (values * post[:, None] - expected).norm() / expected.norm()
            assert 0.01 < error < 0.04


def test_fp4_weights_are_packed_two_to_a_byte(bundles):
    folder, state = bundles.build("nvfp4"), original()
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    levels = torch.cat([levels, -levels])
    stem = "model.blocks.2.ffn.2.weight"
    assert tensors(folder)[f"{stem}.fp4"] == ("U8", (DIM, 512 // 2))
    with safe_open(folder / "transformer.safetensors", "pt") as file:
        packed = file.get_tensor(f"{stem}.fp4")
        scales = file.get_tensor(f"{stem}.block_scales").float()
        post = file.get_tensor(f"{stem}.post").float()
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
    values = levels[codes.long()].reshape(DIM, -1, 16) * scales[..., None]
    expected = state["blocks.2.ffn.2.weight"].float()
    error = (values.flatten(1) * post[:, None] - expected).norm() / expected.norm()
    assert 0.05 < error < 0.15


@pytest.mark.parametrize(("precision", "least", "most"), [("fp8", 0.03, 0.045), ("nvfp4", 0.12, 0.16)])
def test_the_quantization_section_lists_formats_and_errors(bundles, precision, least, most):
    section = manifest(bundles.build(precision)).quantization
    assert section.activations == "dynamic" and section.skipped == () and section.calibration is None
    assert section.formats == dict.fromkeys(NAMES, precision)
    assert set(section.errors) == set(NAMES)
    assert all(least < error < most for error in section.errors.values())


def test_bf16_bundles_have_no_quantization(bundles):
    assert manifest(bundles.build("bf16")).quantization is None


# ---- options ----


def calibration(path: Path, bad: str = "none", coarse: str = "none", **changes: object) -> Path:
    """A calibration in which linears of the kind `bad` lose half of their output, those of `coarse` in NVFP4 only."""
    errors = {
        name: {"fp8": e, "fp8_static": e, "nvfp4": 0.5 if name.endswith(coarse) else 4 * e}
        for name in NAMES
        for e in (0.5 if name.endswith(bad) else 0.03,)
    }
    document = {
        "preset": "tiny",
        "weights": {"checkpoint": "random:0"},
        "prompts": 2,
        "chunks": 3,
        "steps": 5,
        "height": 128,
        "width": 128,
        "variant": "short",
        "modelopt": "0.47.0",
        "amax": dict.fromkeys(NAMES, 6.0),
        "errors": errors,
    }
    Calibration.model_validate(document | changes).save(path)
    return path


def quantized(**options: object):
    from export.request.request import QuantizationRequest

    return QuantizationRequest(**options)


@pytest.mark.slow
def test_skipped_linears_compute_in_bf16_and_are_listed(bundles):
    folder = bundles.build("fp8", name="skipped", quantization=quantized(skip=("*.ffn.2", "*.cross_attn.k")))
    found = manifest(folder)
    assert found.components["layer"].cost.gemms == {"fp8": 5, "bf16": 1}
    assert found.quantization.skipped == tuple(n for n in NAMES if n.endswith(("ffn.2", "cross_attn.k")))
    assert not set(found.quantization.skipped) & set(found.quantization.formats)


def test_auto_leaves_out_what_loses_too_much_and_activations_can_be_static(bundles, tmp_path):
    file = calibration(tmp_path / "ranges.json", bad="self_attn.o", coarse="cross_attn.q")
    options = quantized(static=True, calibration=file, skip=("auto",))
    folder = bundles.build("nvfp4", name="auto", quantization=options)
    found = manifest(folder)
    section = found.quantization
    assert section.skipped == tuple(name for name in NAMES if name.endswith("self_attn.o"))
    assert section.activations == "static"
    assert section.calibration.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert section.errors["blocks.0.ffn.0"] == pytest.approx(0.12)
    assert {section.errors[name] for name in section.skipped} == {0.5}  # what they are left out for
    assert found.components["layer"].cost.gemms == {"fp8": 1, "fp4": 4, "bf16": 1}
    stored = tensors(folder)
    assert stored["model.blocks.1.cross_attn.q.weight.input"] == ("BF16", (1,))
    assert "model.blocks.1.ffn.0.weight.input" not in stored  # NVFP4 is always dynamic


def test_a_searched_mix_of_formats_is_what_the_finished_bundle_computes(bundles, tmp_path):
    """From `--precision auto` to the engines' plans: each kind in the narrowest format that the budget has room for."""
    errors = {kind: {"fp8": 0.002, "nvfp4": 0.01} for kind in (*KINDS, "all")}
    errors["self_attn.o"] = {"fp8": 0.5, "nvfp4": 0.9}
    errors["self_attn.qkv"] = {"fp8": 0.01, "nvfp4": 0.5}
    file = calibration(tmp_path / "ranges.json", output_errors=errors)
    out = tmp_path / "out"
    bundles.start(request(out, "nvfp4", name="searched"))
    options = "--gpu rtx5090 --preset tiny --init random --seed 0 --precision auto --error-budget 0.1 --name searched"
    assert main(["build", *options.split(), "--out", str(out), "--calibration", str(file)]) == 0

    found = manifest(out / "searched")
    section = found.quantization
    wanted = {"self_attn.o": None, "self_attn.qkv": "fp8"}
    expected = {name: wanted.get(name.split(".", 2)[2], "nvfp4") for name in NAMES}
    assert found.precision == "nvfp4"
    assert section.formats == {name: format for name, format in expected.items() if format}
    assert section.skipped == tuple(name for name in NAMES if expected[name] is None)
    assert section.search.budget == 0.1
    assert section.search.error == pytest.approx((6 * 0.01**2 + 0.01**2) ** 0.5)
    assert found.components["layer"].cost.gemms == {"bf16": 1, "fp8": 1, "fp4": 4}
    # All products of the text are one there.
    assert found.components["conditioner"].cost.gemms == {"bf16": 2, "fp4": 1}
    stored = tensors(out / "searched")
    assert stored["model.blocks.1.self_attn.o.weight"] == ("BF16", (DIM, DIM))
    linears = [entry for name, entry in stored.items() if any(f".{kind}.weight" in name for kind in KINDS)]
    planned = plan_memory(request(out, "nvfp4", quantization=quantized(skip=("*.self_attn.o", "*.qkv=fp8"))))
    size = {item.name: item.bytes for item in planned.items}["transformer, block linears"]
    assert sum(STORED[dtype] * int(np.prod(shape)) for dtype, shape in linears) == size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"checkpoint": "random:1"}}, "random:1, this build has random:0"),
        ({"amax": {"blocks.0.ffn.0": 1.0}}, "no range of blocks.0.self_attn.qkv"),
    ],
)
def test_a_calibration_of_another_model_is_refused(tmp_path, changes, message):
    options = quantized(static=True, calibration=calibration(tmp_path / "c.json", **changes))
    with pytest.raises(InputError, match=message):
        build_bundle(request(tmp_path / "out", "fp8", quantization=options))
    assert not (tmp_path / "out").exists()


def test_embedded_weights_make_an_engine_per_layer(bundles):
    folder = embedded(bundles)
    found, stored = manifest(folder), tensors(folder)
    assert found.segments.embedded
    assert found.segments.layers == ({},) * (LAYERS - 1)
    layers = [f"layer.{index}" for index in range(LAYERS - 1)]
    assert [name for name in found.components if name.startswith("layer")] == layers
    assert len({hashes(folder)[f"{name}.engine"] for name in layers}) == len(layers)
    for name in layers:
        assert found.components[name].cost.gemms == {"fp8": 6}
        assert {spec.name for spec in found.components[name].inputs} == {
            *("x", "attention_out", "step", "cross_k", "cross_v")
        }
    assert set(stored) == {tensor for row in found.segments.prepare for tensor in row.values()}


@pytest.mark.slow
def test_layers_that_differ_need_embedded_weights(bundles):
    options = quantized(skip=("blocks.2.ffn.0",))
    folder = bundles.build("fp8", name="mixed", embedded=True, quantization=options)
    costs = {name: part.cost for name, part in manifest(folder).components.items() if part.cost}
    assert costs["layer.2"].gemms == {"fp8": 5, "bf16": 1}
    assert costs["layer.1"].gemms == costs["layer.3"].gemms == {"fp8": 6}


def test_an_engine_in_the_wrong_type_fails_the_build(bundles, monkeypatch, tmp_path):
    wanted = bundles.start(request(tmp_path, "fp8"))
    monkeypatch.setattr("export.backends.tensorrt_rtx.bundle._moved", lambda *arguments: {("fp8", "bf16"): 1})
    with pytest.raises(BuildError, match=r"first: .* found 1 bf16, 1 fp8, expected 2 bf16"):
        build_bundle(wanted)
    assert not (tmp_path / wanted.name).exists()


# ---- calibration ----


@pytest.mark.slow
def test_calibrate_writes_what_a_build_takes_up(bundles, tmp_path, capsys):
    pytest.importorskip("modelopt", reason="ModelOpt is not installed (extra quantize)")
    prompts, file = tmp_path / "prompts.txt", tmp_path / "ranges.json"
    prompts.write_text("# prompts\na red fox in snow\n")
    arguments = ["calibrate", "--gpu", "rtx5090", "--init", "random", "--prompts", str(prompts)]
    assert main([*arguments, "--chunks", "2", "--out", str(file)]) == 0
    assert "cross_attn.k" in capsys.readouterr().out
    measured = Calibration.model_validate_json(file.read_bytes())
    assert set(measured.errors) == set(measured.amax) == set(NAMES)
    assert 0 < measured.latent_errors["fp8"] < measured.latent_errors["nvfp4"] < 0.1
    folder = bundles.build("fp8", name="static", quantization=quantized(static=True, calibration=file))
    section = manifest(folder).quantization
    assert section.errors == {name: found["fp8_static"] for name, found in measured.errors.items()}


def test_copies_of_a_bundle_are_checked(bundles, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(bundles.build("bf16"), copy)
    engine = copy / "layer.engine"
    engine.write_bytes(engine.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=r"layer\.engine"):
        load_bundle(copy)


def test_plan_lists_what_a_layer_launches_and_moves(bundles, capsys):
    """By hand: six products of 192 tokens in fp8, a byte an element of input and weight, two of the result."""
    folder = bundles.build("fp8")
    common = ["plan", "--gpu", "rtx5090", "--preset", "tiny", "--precision", "fp8", "--bundle", str(folder)]
    assert main([*common, "--layer", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    report = read_engine(folder / "layer.engine")
    assert found["launches"] == len(report.launches) + 4  # prepare, score, select, attend
    rows = {row["launch"]: row for row in found["rows"] if row["product"]}
    assert list(rows) == [
        "attend", "self_attn.o", "cross_attn.q", "cross-attention", "cross_attn.o", "ffn.0", "ffn.2", "self_attn.qkv",
    ]  # fmt: skip
    shapes = {"self_attn.o": (DIM, DIM), "ffn.0": (4 * DIM, DIM), "self_attn.qkv": (3 * DIM, DIM)}
    for name, (out, width) in shapes.items():
        assert (rows[name]["format"], rows[name]["flops"]) == ("fp8", 2 * TOKENS * out * width)
        assert 0 <= rows[name]["bytes"] - (TOKENS * width + out * width + 2 * TOKENS * out) < 1024
    before = [row["before"] for row in found["rows"]]
    assert before[:4] == ["prepare", "self-attention", "self-attention", "self-attention"]
    assert before[4] == "self_attn.o" and before[-1] == "self_attn.qkv"  # its scales are left to prepare
    prepare = found["rows"][0]["bytes"]
    assert found["element_wise"]["bytes"] == report.moved_bytes + prepare
    assert main([*common, "--layer"]) == 0
    assert f"{found['launches']} launches" in " ".join(capsys.readouterr().out.split())
    assert main([*common, "--kv", "fp8"]) == 2
    assert "holds keys and values in bf16 and multiplies in bf16, and fp8 and bf16" in capsys.readouterr().err
