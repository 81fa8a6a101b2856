"""Graphs for the tests of the TensorRT-RTX backend: the tiny model's components, and linears written by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

ROWS, WIDTH, OUT = 192, 128, 256


def write_components(folder: Path, *, layers: int = 3) -> None:
    """The tiny preset in bf16: segments of the step, conditioner, text encoder layer, video decoder."""
    import torch

    from export.graph.modules import ConditionerModule, StepModule, merge_qkv
    from export.graph.partition import merge_repeated, partition
    from export.graph.segments import is_kernel, is_parameter
    from export.graph.tracing import operators, save_model, trace
    from export.request.geometry import StepPlan
    from export.request.targets import load_variant
    from lightforcing_ref.checkpoint.spec import umt5_shapes
    from lightforcing_ref.config import PRESETS
    from lightforcing_ref.model import CausalWanModel
    from lightforcing_ref.text import LAYER_WEIGHTS, UMT5Layer

    half = torch.bfloat16
    preset = PRESETS["tiny"]
    preset = replace(preset, dit=replace(preset.dit, layers=layers))
    plan = StepPlan.of(preset, load_variant("short"), preset.height, preset.width, block_q=32, block_k=32)
    torch.manual_seed(0)
    model = CausalWanModel(preset.dit).to(half).requires_grad_(False)
    conditioner = ConditionerModule(model)
    graph = trace(
        conditioner,
        (torch.zeros(preset.dit.text_len, preset.dit.text_dim),),
        input_names=["text"],
        output_names=conditioner.output_names,
    )
    save_model(graph, folder / "conditioner.onnx", "conditioner.weights")
    merge_qkv(model)
    prepare, attend = operators(None)
    step = StepModule(model, plan.spec, plan.schedule, prepare=prepare, attend=attend)
    graph = trace(
        step,
        step.example_inputs(plan.latent_size, plan.max_past_frames, plan.chunk_frames),
        input_names=step.input_names,
        output_names=step.output_names,
    )
    save_model(graph, folder / "step.onnx", "step.weights")
    segments = partition(ir.load(folder / "step.onnx"), is_kernel).segments
    save_model(segments[0].model, folder / "first.onnx")
    save_model(segments[-1].model, folder / "last.onnx")
    save_model(
        merge_repeated(segments[1:-1], name="layer", is_weight=is_parameter).model, folder / "layer.onnx"
    )
    shapes, length = umt5_shapes(preset.text), preset.dit.text_len
    weights = [torch.zeros(shapes[f"layers.0.{name}"], dtype=half) for name in LAYER_WEIGHTS]
    graph = trace(
        UMT5Layer(preset.text, length),
        (torch.zeros(length, preset.text.d_model, dtype=half), torch.ones(length), *weights),
        input_names=["hidden", "mask", *LAYER_WEIGHTS],
        output_names=["hidden_out"],
    )
    save_model(graph, folder / "text_encoder.onnx", "text_encoder.constants")


def write_vae(folder: Path, name: str) -> None:
    """One graph of the tiny preset's video decoder in bf16: `vae_first` or `vae_next`."""
    import torch

    from export.graph.components import VAEFirst, VAENext
    from export.graph.tracing import save_model, trace
    from lightforcing_ref.config import PRESETS
    from lightforcing_ref.decoders.vae import VAEDecoder

    half, preset = torch.bfloat16, PRESETS["tiny"]
    height, width = preset.latent_size()
    decoder = VAEDecoder(preset.vae).to(half).requires_grad_(False)
    caches = decoder.cache_specs(height, width)
    latent = torch.zeros(preset.vae.z_dim, 1, height, width, dtype=half)
    if name == "vae_first":
        module, inputs, taken = VAEFirst(decoder, caches), (latent,), []
        given = [cache for cache in caches if cache.written_by_first]
    else:
        module, taken, given = VAENext(decoder), caches, caches
        inputs = (latent, [torch.zeros(cache.shape, dtype=half) for cache in caches])
    graph = trace(
        module,
        inputs,
        input_names=["latent", *(cache.name for cache in taken)],
        output_names=["frames", *(cache.name.replace("cache.", "cache_out.") for cache in given)],
    )
    save_model(graph, folder / f"{name}.onnx", f"{name}.weights")


def _info(name: str, dtype: int, shape: list[int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def _constant(name: str, dtype: int, value: np.ndarray) -> onnx.TensorProto:
    return helper.make_tensor(name, dtype, value.shape, value.tobytes(), raw=True)


def quantized_linear(path: Path, *, quantize_input: bool) -> Path:
    """Y = dq(q(x)) @ dq(w)^T with an FP8 weight as input; without `quantize_input`, x goes in as it is."""
    bf16, fp8 = TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN
    scale = _constant("scale", bf16, np.array(0.05, ml_dtypes.bfloat16))
    zero = _constant("zero", fp8, np.array(0, ml_dtypes.float8_e4m3fn))
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["w_wide"], name="dequantize_w"),
        helper.make_node("Transpose", ["w_wide"], ["w_t"], perm=[1, 0], name="transpose_w"),
    ]
    if quantize_input:
        nodes += [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["x_q"], name="quantize_x"),
            helper.make_node("DequantizeLinear", ["x_q", "scale", "zero"], ["x_d"], name="dequantize_x"),
        ]
    nodes.append(helper.make_node("MatMul", ["x_d" if quantize_input else "x", "w_t"], ["y"], name="product"))
    return save(
        path,
        nodes,
        [_info("x", bf16, [ROWS, WIDTH]), _info("w", fp8, [OUT, WIDTH])],
        [_info("y", bf16, [ROWS, OUT])],
        [scale, zero],
    )


def save(path: Path, nodes, inputs, outputs, initializers=(), *, domain: str | None = None) -> Path:
    """Write a small model."""
    opsets = [helper.make_opsetid("", 23)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    graph = helper.make_graph(nodes, "small", inputs, outputs, initializer=list(initializers))
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=11), path)
    return path


def floats(name: str, shape: list[int]) -> onnx.ValueInfoProto:
    """A float32 input or output."""
    return _info(name, TensorProto.FLOAT, shape)


def weight(name: str, shape: tuple[int, ...], seed: int = 0) -> onnx.TensorProto:
    """A float32 initializer."""
    return numpy_helper.from_array(
        np.random.default_rng(seed).standard_normal(shape).astype(np.float32), name
    )
