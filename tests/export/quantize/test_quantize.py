"""Quantized graphs in ONNX Runtime against ModelOpt's fake quantization; sharing of weights; reports; refusals."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from export.errors import ExportError, InputError
from export.graph.components import write_conditioner, write_step
from export.graph.float32_twin import float32_twin
from export.graph.modules import StepModule, merge_qkv
from export.graph.partition import merge_repeated, partition
from export.graph.variants import clean_graph
from export.quantize.calibration import Calibration, calibrate, fake_quantize, load_calibration
from export.quantize.cost import fake_quantized, latent_error, layer_errors
from export.quantize.formats import (
    ORT_SESSION_CONFIG,
    auto_formats,
    choose_formats,
    linear_names,
    quantize,
    save_quantized,
)
from export.quantize.graph import is_block_linear
from export.quantize.trial import Trial
from export.request.geometry import StepPlan
from export.request.targets import load_variant
from export.request.weights import Weights
from lightforcing_ref.attention import hsa_attention, qk_prepare
from lightforcing_ref.config import PRESETS
from lightforcing_ref.model import CausalWanModel

LAYERS = 3
STEP_KINDS = ["self_attn.qkv", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2"]
STEP_LINEARS = [f"blocks.{layer}.{kind}" for layer in range(LAYERS) for kind in STEP_KINDS]

FFN = "model.blocks.0.ffn.0.weight"

Feed = dict[str, np.ndarray]


@dataclass(frozen=True)
class Small:
    """A model of three narrow layers on 64 x 64 pixels, exported in float32 to `folder`.

    Its attention is dense: a sparse one jumps where a last bit decides between two key blocks.
    """

    plan: StepPlan
    weights: Weights
    folder: Path
    trial: Trial

    def model(self) -> CausalWanModel:
        model = self.weights.dit(torch.float32)
        merge_qkv(model)
        return model

    def step(self) -> ir.Model:
        return ir.load(self.folder / "step.onnx")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    tiny = PRESETS["tiny"]
    dit = replace(tiny.dit, dim=64, ffn_dim=192, heads=1, layers=LAYERS, text_len=16)
    preset = replace(tiny, dit=dit, block=16)
    plan = StepPlan.of(preset, load_variant("dense"), 64, 64, block_q=16, block_k=16)
    folder, weights = tmp_path_factory.mktemp("small"), Weights(preset, seed=3)
    write_step(folder, weights.dit(torch.float32), plan, per_chunk=False)
    text = torch.randn(1, dit.text_len, dit.text_dim, generator=torch.Generator().manual_seed(5))
    return Small(plan, weights, folder, Trial(plan, tuple(text), chunks=2))


@pytest.fixture(scope="module")
def calibrated(small: Small) -> tuple[Calibration, CausalWanModel]:
    """A calibration, and the model with ModelOpt's static fake quantization that it was read from."""
    pytest.importorskip("modelopt", reason="ModelOpt is not installed (extra quantize)")
    model = small.model()
    return calibrate(model, small.trial, weights={"checkpoint": "random:3"}), model


def quantize_fp8(model: ir.Model, skip: Sequence[str] = (), amax: Mapping[str, float] | None = None) -> None:
    quantize(model, choose_formats(linear_names(model), "fp8", skip=skip), amax=amax)


def quantized_names(model: ir.Model) -> set[str]:
    """The linears that the graph holds in FP8."""
    stored = (name for name in model.graph.initializers if name.endswith(".weight.fp8"))
    return {name.removeprefix("model.").removesuffix(".weight.fp8") for name in stored}


def feeds(model: ir.Model) -> list[Feed]:
    """Inputs of the step graph at two timesteps, with part of the cache in use."""
    made = []
    for step, resident in ((1, 3), (4, 9)):
        rng, feed = np.random.default_rng(step), {}
        for value in model.graph.inputs:
            shape = [16 if not isinstance(dim, int) else dim for dim in value.shape]
            feed[value.name] = rng.standard_normal(shape).astype(np.float32)
        slots = np.full(feed["frame_slots"].shape, -1, np.int32)
        slots[:resident] = rng.permutation(16)[:resident]
        chunk = np.array(resident // 3, np.int32)
        made.append(feed | {"frame_slots": slots, "chunk": chunk, "step": np.array(step, np.int32)})
    return made


def linear_graph(name: str, weight: np.ndarray, *, rows: int = 4, transposed: bool = True) -> ir.Model:
    """Y = x @ weight.T, as the exporter writes it; with transposed=False the weight is stored the other way."""
    helper = onnx.helper
    dtype = helper.np_dtype_to_tensor_dtype(weight.dtype)
    columns = weight.shape[1]
    nodes = [helper.make_node("Transpose", [name], ["t"], perm=[1, 0])] if transposed else []
    nodes.append(helper.make_node("MatMul", ["x", "t" if transposed else name], ["y"]))
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", dtype, [rows, columns])],
        [helper.make_tensor_value_info("y", dtype, [rows, weight.shape[0]])],
        [onnx.numpy_helper.from_array(weight if transposed else weight.T.copy(), name)],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11))


def session(model: Path | ir.Model) -> ort.InferenceSession:
    options = ort.SessionOptions()
    for key, value in ORT_SESSION_CONFIG.items():
        options.add_session_config_entry(key, value)
    source = model if isinstance(model, Path) else ir.to_proto(memory(model)).SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def memory(model: ir.Model) -> ir.Model:
    """The model with its weights read from their files."""
    for value in model.graph.initializers.values():
        value.const_value = ir.tensor(
            value.const_value.numpy(), dtype=value.const_value.dtype, name=value.name
        )
    return model


def run(path: Path, feed: Feed) -> dict[str, np.ndarray]:
    runner = session(path)
    wanted = {value.name: feed[value.name] for value in runner.get_inputs()}
    return dict(zip((v.name for v in runner.get_outputs()), runner.run(None, wanted), strict=True))


def run_torch(small: Small, model: CausalWanModel, feed: Feed) -> dict[str, np.ndarray]:
    plan = small.plan
    module = StepModule(model, plan.spec, plan.schedule, prepare=qk_prepare, attend=hsa_attention)
    tensors = {name: torch.from_numpy(value) for name, value in feed.items()}
    single = [tensors.pop(name) for name in module.input_names[:7]]
    lists = [list(tensors.values())[i * LAYERS : (i + 1) * LAYERS] for i in range(5)]
    with torch.no_grad():
        following, x0, *rest = module(*single, *lists)
    outputs = [following, x0, *(value for part in rest for value in part)]
    return {n: v.numpy() for n, v in zip(module.output_names, outputs, strict=True)}


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def worst(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    assert actual.keys() == expected.keys()
    return max(relative(actual[name], expected[name]) for name in expected)


# ---- against ModelOpt ----

FLIPPED = 5e-3
"""Whole graphs agree to this: where fp32 sums differ in the last bit, a value next to a rounding boundary falls to the
other side, and moves by a sixteenth."""


@pytest.fixture(scope="module")
def dynamic_judge(small: Small) -> CausalWanModel:
    """The model with ModelOpt's fake quantization per token."""
    pytest.importorskip("modelopt", reason="ModelOpt is not installed (extra quantize)")
    model = small.model()
    fake_quantize(model, "dynamic", lambda: None)
    return model


@pytest.mark.parametrize("name", ["blocks.0.self_attn.qkv", "blocks.1.ffn.2"])
@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_one_linear_is_modelopts(
    small: Small,
    calibrated: tuple[Calibration, CausalWanModel],
    dynamic_judge: CausalWanModel,
    activations: str,
    name: str,
    tmp_path: Path,
) -> None:
    calibration, static_judge = calibrated
    judge = (static_judge if activations == "static" else dynamic_judge).get_submodule(name)
    weight = small.model().get_submodule(name).weight.numpy()
    graph = linear_graph(f"model.{name}.weight", weight, rows=48)
    quantize_fp8(graph, amax=calibration.amax if activations == "static" else None)
    save_quantized(graph, tmp_path / "linear.onnx", "linear.weights")
    x = torch.randn(48, weight.shape[1], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        # In the rank the model has: ModelOpt settles on the axis of the scales at its first call.
        expected = (judge(x[None])[0] - (0 if judge.bias is None else judge.bias)).numpy()
    assert relative(run(tmp_path / "linear.onnx", {"x": x.numpy()})["y"], expected) < 1e-6
    assert relative(x.numpy() @ weight.T, expected) > 0.02


def test_dynamic_graph_is_modelopts_fake_quantization(
    small: Small, dynamic_judge: CausalWanModel, tmp_path: Path
) -> None:
    graph = small.step()
    quantize_fp8(graph)
    assert quantized_names(graph) == set(STEP_LINEARS)
    save_quantized(graph, tmp_path / "step.onnx", "fp8.weights")
    onnx.checker.check_model(tmp_path / "step.onnx")
    plain = small.model()
    for feed in feeds(graph):
        actual = run(tmp_path / "step.onnx", feed)
        assert worst(actual, run_torch(small, dynamic_judge, feed)) < FLIPPED
        assert 0.01 < worst(actual, run_torch(small, plain, feed)) < 0.2
        with fake_quantized(plain, choose_formats(STEP_LINEARS, "fp8")):
            assert worst(actual, run_torch(small, plain, feed)) < FLIPPED


def test_static_graph_is_modelopts_fake_quantization(
    small: Small, calibrated: tuple[Calibration, CausalWanModel], tmp_path: Path
) -> None:
    calibration, judge = calibrated
    calibration.save(tmp_path / "ranges.json")
    loaded = load_calibration(tmp_path / "ranges.json")
    assert loaded == calibration and set(loaded.amax) > set(STEP_LINEARS)
    graph = small.step()
    quantize_fp8(graph, amax=loaded.amax)
    assert not [node for node in graph.graph if node.op_type == "ReduceMax"]
    save_quantized(graph, tmp_path / "step.onnx", "fp8.weights")
    for feed in feeds(graph):
        assert worst(run(tmp_path / "step.onnx", feed), run_torch(small, judge, feed)) < FLIPPED


def test_calibration_sees_every_timestep_and_the_cache(
    small: Small, calibrated: tuple[Calibration, CausalWanModel]
) -> None:
    """The ranges are the largest inputs of rollouts that are watched from outside."""
    model, seen, timesteps = small.model(), {}, []
    watched = {n: m for n, m in model.named_modules() if n in calibrated[0].amax}
    for name, module in watched.items():
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.update(
                {name: max(seen.get(name, 0.0), float(inputs[0].abs().max()))}
            )
        )
    model.time_embedding.register_forward_pre_hook(lambda _, inputs: timesteps.append(inputs[0][0, 0, 0]))
    small.trial.run(model)
    assert len(timesteps) == 2 * 5 and len({float(t) for t in timesteps}) == 5
    assert seen == pytest.approx(calibrated[0].amax, rel=1e-5)
    assert len(seen) == LAYERS * 8


def test_conditioner_is_quantized_too(small: Small, tmp_path: Path) -> None:
    write_conditioner(tmp_path, small.model())
    graph = ir.load(tmp_path / "conditioner.onnx")
    text = small.trial.embeddings[0].numpy()
    plain = run(tmp_path / "conditioner.onnx", {"text": text})
    quantize_fp8(graph)
    assert {is_block_linear(name) for name in quantized_names(graph)} == {"cross_attn.k", "cross_attn.v"}
    save_quantized(graph, tmp_path / "fp8.onnx", "fp8.weights")
    assert 1e-3 < worst(run(tmp_path / "fp8.onnx", {"text": text}), plain) < 0.06


def test_bfloat16_graphs_run_as_their_float32_twin(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((24, 64)).astype(ml_dtypes.bfloat16)
    graph = linear_graph(FFN, weight)
    quantize_fp8(graph)
    before = {name: value.const_value.numpy() for name, value in graph.graph.initializers.items()}
    assert before[f"{FFN}.post"].dtype == ml_dtypes.bfloat16
    float32_twin(graph)
    save_quantized(graph, tmp_path / "twin.onnx", "twin.weights")
    twin = ir.load(tmp_path / "twin.onnx")
    for name, value in twin.graph.initializers.items():
        np.testing.assert_array_equal(
            value.const_value.numpy().astype(np.float64), before[name].astype(np.float64)
        )
    # In fp32 from the same weights and scales: only the activations are rounded, to E4M3 of their token's range.
    x = rng.standard_normal((4, 64)).astype(np.float32)
    scale = np.abs(x).max(1, keepdims=True) / np.float32(448)
    rounded = (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    wide = before[f"{FFN}.fp8"].astype(np.float32) * before[f"{FFN}.post"].astype(np.float32)[:, None]
    assert relative(run(tmp_path / "twin.onnx", {"x": x})["y"], rounded @ wide.T) < 1e-6
    assert relative(wide, weight.astype(np.float32)) < 0.04


# ---- files and structure ----


def test_a_quantized_graph_has_a_weights_file_of_its_own(small: Small) -> None:
    """The base graph is left alone, quantized weights take a byte each, and graphs derived later share the file."""
    base = small.folder / "step.weights"
    digest = hashlib.sha256(base.read_bytes()).hexdigest()
    graph = small.step()
    quantize_fp8(graph, skip=["blocks.1.*"])
    save_quantized(graph, small.folder / "fp8.onnx", "fp8.weights")
    assert hashlib.sha256(base.read_bytes()).hexdigest() == digest
    # dim 64, ffn 192: qkv + o + cross q + cross o + two ffn matrices, of two layers, one byte each
    values = 2 * (3 * 64 * 64 + 3 * 64 * 64 + 2 * 64 * 192)
    saved = ir.load(small.folder / "fp8.onnx").graph.initializers.values()
    outside = [value for value in saved if isinstance(value.const_value, ir.ExternalTensor)]
    assert {Path(value.const_value.path).name for value in outside} == {"fp8.weights"}
    eight = [value.const_value for value in outside if value.dtype == ir.DataType.FLOAT8E4M3FN]
    assert sum(tensor.nbytes for tensor in eight) == values
    saving = base.stat().st_size - (small.folder / "fp8.weights").stat().st_size
    scales = 4 * 2 * (3 * 64 + 3 * 64 + 192 + 64)
    assert saving == pytest.approx(3 * values - scales, rel=0.02), "three bytes less for every value"
    clean = clean_graph(ir.load(small.folder / "fp8.onnx"), small.plan.schedule.clean_step)
    ir.save(clean, small.folder / "fp8_clean.onnx")
    feed = feeds(graph)[1]
    assert feed["step"] == small.plan.schedule.clean_step
    whole = run(small.folder / "fp8.onnx", feed)
    for name, value in run(small.folder / "fp8_clean.onnx", feed).items():
        np.testing.assert_allclose(value, whole[name], atol=1e-5)


@pytest.mark.parametrize("static", [False, True])
def test_quantized_layers_still_share_one_engine(small: Small, static: bool) -> None:
    graph = small.step()
    amax = {name: 1.0 + index for index, name in enumerate(linear_names(graph))} if static else None
    quantize_fp8(graph, amax=amax)
    cut = partition(graph, lambda node: node.domain == "lightforcing")
    layer = merge_repeated(
        cut.segments[1:-1],
        name="layer",
        is_weight=lambda name: not name.startswith(("quantize.", "val_", "scalar_")),
    )
    stem = "model.blocks.1.ffn.0.weight"
    assert {f"{stem}.fp8", f"{stem}.post"} <= set(layer.bindings[1])
    assert (f"{stem}.input" in layer.bindings[1]) is static
    eight = [v for v in layer.model.graph.inputs if v.dtype == ir.DataType.FLOAT8E4M3FN]
    assert len(eight) == len(STEP_KINDS)
    scales = [n.inputs[1] for n in layer.model.graph if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(scales) == 3 * len(STEP_KINDS)
    assert all(scale.is_initializer() and scale.const_value.numpy() == 1 for scale in scales)

    # The shared layer, fed the second layer's weights, computes what the second segment does with them inside.
    rng = np.random.default_rng(0)
    own, outer = cut.segments[2].model, [value.name for value in layer.model.graph.inputs]
    feed = {
        value.name: rng.standard_normal(value.shape.numpy()).astype(np.float32)
        for value in own.graph.inputs
        if value.dtype == ir.DataType.FLOAT
    } | {"step": np.array(2, np.int32)}
    weights = {name: graph.graph.initializers[name].const_value for name in layer.bindings[1]}
    inside = session(own).run(None, {value.name: feed[value.name] for value in own.graph.inputs})
    shared = dict(zip(layer.inputs, (feed[name] for name in layer.activations[1][0]), strict=True))
    given = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in shared.items()}
    given |= {
        name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
            tensor.numpy().view(np.uint8 if tensor.dtype.itemsize == 1 else np.float32), int(tensor.dtype)
        )
        for name, tensor in zip(layer.weights, weights.values(), strict=True)
    }
    assert set(given) == set(outer)
    outside = session(layer.model).run_with_ort_values(None, given)
    assert len(inside) == len(outside) > 0
    for ours, theirs in zip(outside, inside, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-5, atol=1e-5)


def test_weights_are_computed_only_when_written(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    from export.quantize import graph as module

    computed = []
    fold = module.fold_weight  # type: ignore[attr-defined]
    monkeypatch.setattr(
        module, "fold_weight", lambda w, *args, **kw: computed.append(w.shape) or fold(w, *args, **kw)
    )
    graph = small.step()
    quantize_fp8(graph)
    assert not computed
    ir.to_proto(graph)
    assert len(computed) == len(STEP_LINEARS), "each layer once, although it has two tensors"


# ---- which layers, and reports ----


def test_patterns_choose_what_is_skipped() -> None:
    assert list(choose_formats(STEP_LINEARS, "fp8", skip=["blocks.0.*", "*.ffn.2"])) == [
        name for name in STEP_LINEARS if not name.startswith("blocks.0") and not name.endswith("ffn.2")
    ]
    assert choose_formats(STEP_LINEARS, "nvfp4") == dict.fromkeys(STEP_LINEARS, "nvfp4")
    formats = choose_formats(STEP_LINEARS, "nvfp4", skip=["*_attn.*=fp8", "blocks.0.ffn.0", "*_attn.q=bf16"])
    for name in STEP_LINEARS:
        left = name == "blocks.0.ffn.0" or name.endswith("cross_attn.q")
        assert formats.get(name) == (None if left else "fp8" if "_attn." in name else "nvfp4")
    with pytest.raises(InputError, match=r"--skip '\*.ffn.0=fp4' leads to 'fp4'; expected fp8 or bf16"):
        choose_formats(STEP_LINEARS, "nvfp4", skip=["*.ffn.0=fp4"])
    with pytest.raises(InputError, match=r"'ffn.3' matches none of the 18 linears"):
        choose_formats(STEP_LINEARS, "fp8", skip=["ffn.3"])


def test_auto_falls_back_to_the_next_finer_format() -> None:
    errors = {
        "blocks.0.self_attn.o": {"nvfp4": 0.01, "fp8": 0.03},
        "blocks.0.ffn.0": {"nvfp4": 0.1, "fp8": 0.03},
        "blocks.1.ffn.0": {"nvfp4": 0.6, "fp8": 0.03},
        "blocks.0.ffn.2": {"nvfp4": 0.6, "fp8": 0.2},
        "blocks.1.ffn.2": {"nvfp4": 0.1, "fp8": float("nan")},
    }
    same = auto_formats(errors, "nvfp4")
    assert same == {"blocks.0.self_attn.o": "nvfp4", "blocks.0.ffn.0": "fp8", "blocks.1.ffn.0": "fp8"}
    each = auto_formats(errors, "nvfp4", same_in_all_layers=False)
    assert each == same | {"blocks.0.ffn.0": "nvfp4", "blocks.1.ffn.2": "nvfp4"}
    each = auto_formats(errors, "fp8", thresholds={"fp8": 0.3}, same_in_all_layers=False)
    assert each == dict.fromkeys(list(errors)[:-1], "fp8")
    with pytest.raises(InputError, match=r"the error of blocks.0.ffn.0 in nvfp4 was not measured"):
        auto_formats({"blocks.0.ffn.0": {"fp8": 0.03}}, "nvfp4")


def test_errors_decide_what_is_skipped(small: Small) -> None:
    model = small.model()
    errors = layer_errors(model, small.trial, ("fp8", "nvfp4"))
    assert len(errors) == LAYERS * 8
    assert all(0.01 < e["fp8"] < 0.06 and 0.05 < e["nvfp4"] < 0.2 for e in errors.values())
    # One layer far out of range: a single channel of its input dwarfs the others, and its weights ignore that channel.
    spoiled = copy.deepcopy(model)
    with torch.no_grad():
        spoiled.blocks[1].ffn[0].bias[0] = 1e6
        spoiled.blocks[1].ffn[2].weight[:, 0] = 0.0
    measured = layer_errors(spoiled, small.trial, ("fp8",))
    formats = auto_formats(measured, "fp8", same_in_all_layers=False)
    assert [name for name in errors if name not in formats] == ["blocks.1.ffn.2"]

    graph = small.step()
    quantize(graph, formats)
    latent = latent_error(model, small.trial, formats)
    assert set(STEP_LINEARS) - quantized_names(graph) == {"blocks.1.ffn.2"}
    assert measured["blocks.1.ffn.2"]["fp8"] > 0.08
    assert 1e-3 < latent.total < 0.5
    assert len(latent.per_chunk) == small.trial.chunks


def test_nothing_quantized_is_no_error(small: Small) -> None:
    assert latent_error(small.model(), small.trial, {}).total == 0.0


# ---- refusals ----


def test_what_cannot_be_quantized_is_named(small: Small) -> None:
    graph = small.step()
    amax = dict.fromkeys(STEP_LINEARS, 1.0) | {"blocks.1.ffn.0": 0.0}
    with pytest.raises(ExportError, match=r"input range of blocks.1.ffn.0 is 0; expected a positive"):
        quantize_fp8(graph, amax=amax)
    assert str(graph.graph) == str(small.step().graph)
    with pytest.raises(InputError, match="merge_qkv"):
        layer_errors(small.weights.dit(torch.float32), small.trial, ("fp8",))
    with pytest.raises(InputError, match="observes nothing"):
        Trial(small.plan, ())


@pytest.mark.parametrize(
    ("graph", "precision", "message"),
    [
        (
            linear_graph(FFN, np.ones((8, 24), np.float32)),
            "nvfp4",
            "blocks.0.ffn.0 has 24 inputs; NVFP4 needs a multiple of 16",
        ),
        (
            linear_graph(FFN, np.ones((8, 32), np.float16)),
            "fp8",
            "is float16, where unscaled FP8 products overflow",
        ),
        (
            linear_graph(FFN, np.ones((8, 32), np.float32), transposed=False),
            "fp8",
            "not used as one x @ weight.T",
        ),
    ],
)
def test_graphs_that_do_not_fit_are_refused(graph: ir.Model, precision: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        quantize(graph, choose_formats(["blocks.0.ffn.0"], precision))
