"""The components of a bundle as ONNX files: step, clean, conditioner, text encoder, video decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from export.progress import StepCallback, no_steps
from export.request.geometry import StepPlan
from lightforcing_ref.checkpoint.spec import umt5_shapes
from lightforcing_ref.decoders.layers import CacheSpec
from lightforcing_ref.decoders.tae import VideoDecoder
from lightforcing_ref.decoders.vae import to_uint8
from lightforcing_ref.model import CausalWanModel
from lightforcing_ref.text import LAYER_WEIGHTS, UMT5Layer
from plugins.nodes.functions import AttentionForm
from runtime.bundle import ELEMENT_TYPES, Component, TensorSpec, dtypes_by

from .modules import ConditionerModule, StepModule, cache_stems, merge_qkv
from .rewrites import sink_uint8
from .tensor_files import store, write_tensors
from .tracing import OPERATORS, operators, save_model, trace
from .variants import clean_graph, per_chunk_graph

__all__ = [
    "TEXT_WEIGHTS",
    "TOKENIZER",
    "TRACING",
    "ScaleByWeights",
    "VAEFirst",
    "VAENext",
    "attention_form",
    "cache_out",
    "component_of",
    "per_chunk_name",
    "precisions_of",
    "tensor_specs",
    "write_conditioner",
    "write_step",
    "write_text_encoder",
    "write_vae",
]

TEXT_WEIGHTS = "text_encoder.safetensors"
TOKENIZER = "tokenizer.json"

TRACING = "tracing"
"""The phase of a part before its weights are written."""


def component_of(folder: Path, file: str) -> Component:
    """The manifest entry of the graph `folder/file`, read from the graph itself."""
    graph = ir.load(folder / file).graph
    return Component(file=file, inputs=tensor_specs(graph.inputs), outputs=tensor_specs(graph.outputs))


_DTYPES = {ir.DataType[name]: dtype for name, dtype in dtypes_by("onnx").items()}


def tensor_specs(values: Iterable[ir.Value]) -> tuple[TensorSpec, ...]:
    """Name, type and shape of each value; a symbolic size is its name."""
    return tuple(_spec(value) for value in values)


def precisions_of(model: ir.Model) -> set[str]:
    """What the graph's own tensors are in, of fp32, fp16, bf16, fp8 and nvfp4."""
    graph = model.graph
    values = (*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs))
    floats = {value.dtype for value in values if value.dtype is not None and value.dtype.is_floating_point()}
    return {ELEMENT_TYPES[_DTYPES[dtype]].precision for dtype in floats if dtype in _DTYPES}


def _spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None and value.dtype is not None and value.shape is not None
    shape = tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape)
    return TensorSpec(name=value.name, dtype=_DTYPES[value.dtype], shape=shape)


def per_chunk_name(chunk: int) -> str:
    """Component name of the step graph specialised for one chunk."""
    return f"step_chunk{chunk}"


def write_step(
    folder: Path,
    model: CausalWanModel,
    plan: StepPlan,
    *,
    per_chunk: bool,
    progress: StepCallback = no_steps,
) -> list[str]:
    """Write the step graph, the clean graph derived from it, and if wanted one graph per planned chunk.

    All share one weights file. `model` is used up: its projections are merged in place.
    """
    progress(TRACING, 0, 1)
    merge_qkv(model)
    prepare, attend = operators(plan.spec.kv, plan.spec.products, plan.attends(OPERATORS))
    module = StepModule(model, plan.spec, plan.schedule, prepare=prepare, attend=attend)
    layers = plan.preset.dit.layers
    slots = torch.export.Dim("slots", min=1)
    past: tuple[object, ...] = ([{0: slots}] * layers,) * len(cache_stems(plan.spec.kv))
    pinned = (None,) if plan.spec.persistent_frames else ()
    step = trace(
        module,
        module.example_inputs(plan.latent_size, plan.max_past_frames, plan.chunk_frames),
        input_names=module.input_names,
        output_names=module.output_names,
        dynamic_shapes=(*[None] * 7, [None] * layers, [None] * layers, (*past, *pinned)),
        attention=attention_form(plan),
        metadata={"lightforcing.component": "step"},
    )
    _name_dimension(step, "slots")
    save_model(step, folder / "step.onnx", "step.weights", progress)
    files = ["step.onnx", "step.weights", "clean.onnx"]
    save_model(clean_graph(ir.load(folder / "step.onnx"), plan.schedule.clean_step), folder / "clean.onnx")
    for chunk in range(plan.planned_chunks if per_chunk else 0):
        files.append(f"{per_chunk_name(chunk)}.onnx")
        graph = per_chunk_graph(ir.load(folder / "step.onnx"), chunk, plan.past_frames(chunk))
        save_model(graph, folder / files[-1])
    return files


DENSE_SCORE_BYTES = 1 << 28
"""Largest score matrix of one layer that the plain function body may materialise."""


def attention_form(plan: StepPlan) -> AttentionForm:
    """The function body that suits a plan: scanning wins as soon as blocks are skipped, and where memory is short."""
    keys = plan.variant.window_frames * plan.geometry.frame_tokens
    fits = 4 * plan.spec.heads * plan.chunk_tokens * keys <= DENSE_SCORE_BYTES
    return "dense" if fits and plan.variant.is_dense else "scan"


def _name_dimension(model: ir.Model, name: str) -> None:
    """Give the one symbolic dimension its public name; the exporter invents one."""
    for value in model.graph.inputs:
        if value.shape is not None:
            for axis, dim in enumerate(value.shape):
                if not isinstance(dim, int):
                    value.shape[axis] = ir.SymbolicDim(name)


def write_conditioner(folder: Path, model: CausalWanModel, progress: StepCallback = no_steps) -> list[str]:
    """Write the graph that turns a prompt's embedding into every layer's cross-attention keys and values."""
    progress(TRACING, 0, 1)
    module = ConditionerModule(model)
    config = model.config
    graph = trace(
        module,
        (torch.zeros(config.text_len, config.text_dim),),
        input_names=["text"],
        output_names=module.output_names,
        metadata={"lightforcing.component": "conditioner"},
    )
    save_model(graph, folder / "conditioner.onnx", "conditioner.weights", progress)
    return ["conditioner.onnx", "conditioner.weights"]


class _TextLayer(nn.Module):
    """An encoder layer that computes in the type of its weights; hidden states are float32 outside."""

    def __init__(self, layer: UMT5Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, mask: Tensor, *weights: Tensor) -> Tensor:
        out: Tensor = self.layer(hidden.to(weights[0].dtype), mask, *weights)
        return out.float()


def write_text_encoder(
    folder: Path,
    plan: StepPlan,
    weights: Mapping[str, Callable[[], Tensor]],
    dtype: torch.dtype = torch.float32,
    progress: StepCallback = no_steps,
) -> list[str]:
    """Write the graph of one encoder layer, whose weights are inputs, and the weights of all layers.

    Args:
        weights: makers of the weights, by name; called one by one.
        dtype: that the weights are stored in and the layer computes in.
    """
    config, length = plan.preset.text, plan.preset.dit.text_len
    shapes = umt5_shapes(config)
    layer = [torch.zeros(shapes[f"layers.0.{name}"], dtype=dtype) for name in LAYER_WEIGHTS]
    graph = trace(
        _TextLayer(UMT5Layer(config, length)),
        (torch.zeros(length, config.d_model), torch.ones(length), *layer),
        input_names=["hidden", "mask", *LAYER_WEIGHTS],
        output_names=["hidden_out"],
        metadata={"lightforcing.component": "text_encoder"},
    )
    save_model(graph, folder / "text_encoder.onnx", "text_encoder.constants")
    write_tensors(
        folder / TEXT_WEIGHTS,
        [store(name, shapes[name], dtype, make) for name, make in weights.items()],
        progress,
    )
    files = ["text_encoder.onnx", TEXT_WEIGHTS]
    return [*files, "text_encoder.constants"] if (folder / "text_encoder.constants").exists() else files


class VAEFirst(nn.Module):
    """Decoding of the first latent frame, to pixels; returns the caches that it writes."""

    def __init__(self, decoder: VideoDecoder, caches: Sequence[CacheSpec]) -> None:
        super().__init__()
        self.decoder = decoder
        self.written = [index for index, cache in enumerate(caches) if cache.written_by_first]

    def forward(self, latent: Tensor) -> tuple[Tensor, list[Tensor]]:
        video, caches = self.decoder.decode_first(latent)
        return to_uint8(video.float()), [caches[index] for index in self.written]


class VAENext(nn.Module):
    """Decoding of a later latent frame, to pixels."""

    def __init__(self, decoder: VideoDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, latent: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        video, caches = self.decoder.decode_next(latent, caches)
        return to_uint8(video.float()), caches


class ScaleByWeights(nn.Module):
    """`LatentScale` with the statistics of the latents among the weights, for graphs without constants."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.empty(channels))
        self.std = nn.Parameter(torch.empty(channels))

    def forward(self, latents: Tensor) -> Tensor:
        mean, std = (values[:, None, None, None] for values in (self.mean, self.std))
        return latents * std + mean


def _narrow(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What comes into the decoder's first convolution, in that convolution's type."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return (args[0].to(weight.dtype), *args[1:])


def write_vae(
    folder: Path, decoder: VideoDecoder, plan: StepPlan, progress: StepCallback = no_steps
) -> list[str]:
    """Write the two graphs of the streaming decoder: first frame and later ones.

    They compute in the type of the decoder's weights, which is that of the caches. The latent is float32 and is
    denormalised in float32, and so is the arithmetic of the pixels.
    """
    progress(TRACING, 0, 1)
    height, width = plan.latent_size
    caches = decoder.cache_specs(height, width)
    latent = torch.zeros(decoder.config.z_dim, 1, height, width)
    dtype = next(decoder.parameters()).dtype
    handle = decoder.entry.register_forward_pre_hook(_narrow)
    try:
        later = trace(
            VAENext(decoder),
            (latent, [torch.zeros(cache.shape, dtype=dtype) for cache in caches]),
            input_names=["latent", *(cache.name for cache in caches)],
            output_names=["frames", *(cache_out(cache) for cache in caches)],
            metadata={"lightforcing.component": "vae_next"},
        )
        first = trace(
            VAEFirst(decoder, caches),
            (latent,),
            input_names=["latent"],
            output_names=["frames", *(cache_out(cache) for cache in caches if cache.written_by_first)],
            metadata={"lightforcing.component": "vae_first"},
        )
    finally:
        handle.remove()
    for graph, name in ((later, "vae_next"), (first, "vae_first")):
        sink_uint8(graph)
        save_model(graph, folder / f"{name}.onnx", f"{name}.weights", progress)
    return ["vae_next.onnx", "vae_next.weights", "vae_first.onnx", "vae_first.weights"]


def cache_out(cache: CacheSpec) -> str:
    """The name of a streaming cache as an output."""
    return cache.name.replace("cache.", "cache_out.")
