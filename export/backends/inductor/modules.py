"""The modules that Inductor compiles: the reference model cut at its operators, weights and outputs as inputs.

The cuts are those of every segmented bundle (see `export.graph.segments`). A block is cut through the attention core
that the model takes: what a core is called with is one segment's result, and what it returns is the next one's input.
The other half is left in place without weights, does nothing that anyone reads, and is dropped by tracing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from export.graph.modules import ConditionerModule
from export.quantize.numerics import FP8_MAX, SMALLEST_SCALE, to_e4m3
from export.request.geometry import StepPlan
from lightforcing_ref.checkpoint.spec import umt5_shapes
from lightforcing_ref.config import DiTConfig
from lightforcing_ref.model import Block, CausalWanModel, CrossKV, QKVParams, SelfAttention
from lightforcing_ref.text import LAYER_WEIGHTS, UMT5Config, UMT5Layer
from runtime.bundle import Component, TensorSpec, dtype_name

__all__ = [
    "Compiled",
    "Fp8Linear",
    "StepSegments",
    "conditioner",
    "step_segments",
    "tensor_name",
    "tensor_spec",
    "text_layer",
    "weights_of",
]


class Compiled(nn.Module):
    """What becomes one package: `forward` takes inputs, then weights, then the buffers that receive the results.

    A package thus allocates nothing that leaves it: every tensor it reads or writes has the address its caller chose.

    Args:
        body: maps the inputs to the outputs, in their order.
        weights: body parameter -> input name; all others are compiled in.
    """

    def __init__(
        self,
        body: nn.Module,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        weights: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.body = body
        self.weights = dict(weights or {})
        parameters = dict(body.named_parameters())
        self.inputs = (
            *inputs,
            *(
                tensor_spec(name, parameters[key].shape, parameters[key].dtype)
                for key, name in self.weights.items()
            ),
        )
        self.outputs = tuple(outputs)

    def forward(self, *tensors: Tensor) -> None:
        first_weight, first_output = len(self.inputs) - len(self.weights), len(self.inputs)
        weights = dict(zip(self.weights, tensors[first_weight:first_output], strict=True))
        results = functional_call(self.body, weights, tensors[:first_weight])
        for buffer, result in zip(tensors[first_output:], results, strict=True):
            buffer.copy_(result)

    def examples(self, device: str) -> tuple[Tensor, ...]:
        """Tensors to trace with: inputs, weights, output buffers."""
        return tuple(
            torch.zeros([int(dim) for dim in spec.shape], dtype=getattr(torch, spec.dtype), device=device)
            for spec in (*self.inputs, *self.outputs)
        )

    def component(self, file: str) -> Component:
        """The manifest's entry."""
        return Component(file=file, inputs=self.inputs, outputs=self.outputs)


def tensor_spec(name: str, shape: Sequence[int], dtype: torch.dtype) -> TensorSpec:
    """An input or output as the manifest describes it."""
    return TensorSpec(name=name, dtype=dtype_name(dtype), shape=tuple(shape))


class Fp8Linear(nn.Module):
    """A linear in E4M3: weights with a scale per output channel, activations with one per token.

    The scale of a token is computed and applied in plain tensor operations, so Inductor fuses them into whatever
    element-wise kernel produces the input; the product is `torch._scaled_mm`. The numbers are those of
    `export.quantize.numerics.fake_linear`, but for the rounding of the scale's reciprocal.

    Attributes:
        emulated: multiply the quantized values in float32 instead, which any PyTorch does on any machine.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        shape, device = linear.weight.shape, linear.weight.device
        fp8 = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
        self.weight = nn.Parameter(fp8, requires_grad=False)
        self.post = nn.Parameter(torch.empty(shape[0], device=device), requires_grad=False)
        self.bias = linear.bias
        self.emulated = False

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2).float()
        scale = (rows.abs().amax(-1, keepdim=True) / FP8_MAX).clamp_min(SMALLEST_SCALE)
        quantized = to_e4m3(
            rows * scale.reciprocal()
        )  # a division for every element would take longer than the rest
        if self.emulated:
            product = (quantized.float() @ self.weight.float().t() * scale * self.post).to(x.dtype)
        else:
            product = torch._scaled_mm(
                quantized,
                self.weight.t(),
                scale_a=scale,
                scale_b=self.post[None],
                out_dtype=x.dtype,
                use_fast_accum=x.is_cuda,
            )
        out: Tensor = product.reshape(*x.shape[:-1], -1)
        # The bias is added outside, where it fuses with what follows; inside it must be bfloat16.
        return out if self.bias is None else out + self.bias


class _Gelu(nn.Module):
    """GELU in its tanh form, written with the logistic function, which a GPU evaluates in a third of the instructions.

    `(1 + tanh(u)) / 2` is `sigmoid(2 u)`.
    """

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.sigmoid(_GELU_SCALE * (wide + 0.044715 * wide * wide * wide))).to(x.dtype)


_GELU_SCALE = 2 * (2 / math.pi) ** 0.5


class _Through(nn.Module):
    """Stands where a part of a block was cut away."""

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return x


class _NoWeight(nn.Module):
    """Stands for a norm whose weight an operator applies."""

    weight = None
    eps = 0.0


def _without_operator_weights(attention: SelfAttention) -> None:
    for name in ("norm_q", "norm_k"):
        attention.add_module(name, _NoWeight())
    attention.register_parameter("qkv_bias", None)
    attention.proj_l = None


def _half(config: DiTConfig, *, start: bool) -> Block:
    """A block that has only what comes before its attention core, or what comes after it."""
    block = Block(config)
    del block.modulation
    block.self_attn.merge()
    _without_operator_weights(block.self_attn)
    if start:
        block.self_attn.add_module("o", _Through())
        for name in ("norm3", "cross_attn", "ffn"):
            block.add_module(name, _Through())
    else:
        block.self_attn.add_module("qkv", _Through())
        for name in ("k", "v", "norm_k"):
            delattr(block.cross_attn, name)
        for name, child in block.ffn.named_children():
            if isinstance(child, nn.GELU):
                block.ffn.add_module(name, _Gelu())
    return block


def _quantize(module: nn.Module, kinds: frozenset[str], prefix: str = "") -> None:
    for name, child in list(module.named_children()):
        path = f"{prefix}{name}"
        if path in kinds and isinstance(child, nn.Linear):
            module.add_module(name, Fp8Linear(child))
        else:
            _quantize(child, kinds, f"{path}.")


def _start(block: Block, x: Tensor, modulation: Tensor) -> Tensor:
    """The merged projection `[T, 3 dim]` of residual stream `[1, T, dim]`."""
    seen: list[Tensor] = []

    def core(layer: int, qkv: Tensor, params: QKVParams) -> Tensor:
        seen.append(qkv)
        return qkv[..., : x.shape[-1]]

    nothing: CrossKV = (x, x)
    block(x, modulation.chunk(6, dim=1), nothing, 0, core)
    return seen[0][0]


def _finish(block: Block, x: Tensor, attention_out: Tensor, modulation: Tensor, cross: CrossKV) -> Tensor:
    """The residual stream `[1, T, dim]` behind a block whose attention gave `attention_out` `[T, H, D]`."""

    def core(layer: int, qkv: Tensor, params: QKVParams) -> Tensor:
        return attention_out.flatten(1)[None]

    k, v = cross
    out: Tensor = block(x, modulation.chunk(6, dim=1), (k[None], v[None]), 0, core)
    return out


def _at(table: Tensor, step: Tensor, dim: int = 0) -> Tensor:
    return table.index_select(dim, step.reshape(1))


def _table(steps: int, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(steps, *shape))


class _Patches(CausalWanModel):
    """The model's patch embedding alone."""

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype


def _outer(model: CausalWanModel, keep: str) -> CausalWanModel:
    for name, _ in list(model.named_children()):
        if name != keep:
            delattr(model, name)
    return model


class _First(nn.Module):
    def __init__(self, config: DiTConfig, steps: int) -> None:
        super().__init__()
        self.model = _outer(_Patches(replace(config, layers=0)), "patch_embedding")
        self.start = _half(config, start=True)
        self.next_modulation = _table(steps, 6, config.dim)

    def forward(self, latent: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        x = self.model.tokens(latent[None])
        return x, _start(self.start, x, _at(self.next_modulation, step))


class _Layer(nn.Module):
    def __init__(self, config: DiTConfig, steps: int) -> None:
        super().__init__()
        self.finish, self.start = _half(config, start=False), _half(config, start=True)
        self.modulation, self.next_modulation = (_table(steps, 6, config.dim) for _ in range(2))

    def forward(
        self, x: Tensor, attention_out: Tensor, step: Tensor, cross_k: Tensor, cross_v: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = _finish(self.finish, x, attention_out, _at(self.modulation, step), (cross_k, cross_v))
        return x, _start(self.start, x, _at(self.next_modulation, step))


class _Last(nn.Module):
    def __init__(self, config: DiTConfig, steps: int) -> None:
        super().__init__()
        self.model = _outer(CausalWanModel(replace(config, layers=0)), "head")
        self.model.head.register_parameter("modulation", None)
        self.finish = _half(config, start=False)
        self.modulation, self.head_modulation = _table(steps, 6, config.dim), _table(steps, 2, config.dim)
        self.sigmas = _table(2, steps)

    def forward(
        self,
        x: Tensor,
        attention_out: Tensor,
        step: Tensor,
        cross_k: Tensor,
        cross_v: Tensor,
        latent: Tensor,
        noise: Tensor,
    ) -> tuple[Tensor, Tensor]:
        x = _finish(self.finish, x, attention_out, _at(self.modulation, step), (cross_k, cross_v))
        model = self.model
        out = model.head(x, _at(self.head_modulation, step).chunk(2, dim=1))
        flow = model.latents(out, *latent.shape[1:])[0].float()
        sigma, following = _at(self.sigmas, step, 1).chunk(2, dim=0)
        x0 = latent - sigma * flow
        return (1 - following) * x0 + following * noise, x0


@dataclass(frozen=True)
class StepSegments:
    """The three packages of the step, and where each of their weight inputs comes from."""

    first: Compiled
    layer: Compiled
    last: Compiled

    @property
    def by_name(self) -> dict[str, Compiled]:
        return {"first": self.first, "layer": self.layer, "last": self.last}


def step_segments(plan: StepPlan, dtype: torch.dtype, linears: frozenset[str] = frozenset()) -> StepSegments:
    """The segments of a plan's step in `dtype`; they hold no weights.

    Args:
        linears: kinds of the block linears that are in FP8, such as "ffn.0".
    """
    config, steps = plan.preset.dit, len(plan.schedule.row_timesteps)
    height, width = plan.latent_size
    tokens, name = plan.chunk_tokens, dtype_name(dtype)

    def ports(*names: str) -> list[TensorSpec]:
        latent = ("float32", (config.channels, plan.chunk_frames, height, width))
        stream = (name, (1, tokens, config.dim))
        cross = (name, (config.text_len, config.heads, config.head_dim))
        known: dict[str, tuple[str, tuple[int, ...]]] = {
            **dict.fromkeys(("latent", "noise", "next_latent", "x0"), latent),
            **dict.fromkeys(("x", "x_out"), stream),
            **dict.fromkeys(("cross_k", "cross_v"), cross),
            "step": ("int32", ()),
            "qkv": (name, (tokens, 3 * config.dim)),
            "attention_out": (name, (tokens, config.heads, config.head_dim)),
        }
        return [
            TensorSpec.model_validate({"name": n, "dtype": known[n][0], "shape": known[n][1]}) for n in names
        ]

    def segment(body: nn.Module, inputs: list[TensorSpec], outputs: list[TensorSpec]) -> Compiled:
        body.to(dtype)
        if isinstance(body, _Last):
            body.sigmas.data = body.sigmas.data.float()
        for half in ("start", "finish"):
            if hasattr(body, half):
                _quantize(getattr(body, half), linears)
        weights = {key: key for key, _ in body.named_parameters()}
        return Compiled(body.requires_grad_(False), inputs, outputs, weights)

    with torch.device("meta"):
        inner = ports("x", "attention_out", "step", "cross_k", "cross_v")
        return StepSegments(
            segment(_First(config, steps), ports("latent", "step"), ports("x_out", "qkv")),
            segment(_Layer(config, steps), inner, ports("x_out", "qkv")),
            segment(_Last(config, steps), inner + ports("latent", "noise"), ports("next_latent", "x0")),
        )


def tensor_name(weight: str, layer: int, linears: frozenset[str] = frozenset()) -> str:
    """Name in the weights file of a weight input of a segment.

    Args:
        layer: index of the layer whose attention runs before the segment; -1 for `first`.
        linears: kinds of the linears that are in FP8.
    """
    tables = {"modulation": f"modulation_{layer}", "next_modulation": f"modulation_{layer + 1}"}
    half, _, rest = weight.partition(".")
    if half not in ("start", "finish"):
        return tables.get(weight, weight)
    block = layer + 1 if half == "start" else layer
    linear, _, leaf = rest.rpartition(".")
    if linear in linears and leaf in ("weight", "post"):
        rest = f"{linear}.weight.{'fp8' if leaf == 'weight' else 'post'}"
    return f"model.blocks.{block}.{rest}"


class _TextLayer(nn.Module):
    """A layer of the text encoder that keeps the hidden states in float32 between layers.

    The buckets of relative positions are computed where they are used: a table would be a constant of the package.
    """

    def __init__(self, config: UMT5Config, length: int) -> None:
        super().__init__()
        self.layer = UMT5Layer(config, length)
        first = self.layer.buckets[
            :, 0
        ].tolist()  # of the first key, as seen from queries further and further away
        self._steps = [place for place in range(1, length) if first[place] > first[place - 1]]
        self._half = config.buckets // 2
        del self.layer.buckets
        self.layer.register_buffer("buckets", None)

    def forward(self, hidden: Tensor, mask: Tensor, *weights: Tensor) -> tuple[Tensor]:
        position = torch.arange(hidden.shape[0], dtype=torch.int32, device=hidden.device)
        offset = position[None, :] - position[:, None]
        distance = offset.abs()
        buckets = self._half * (offset > 0).to(torch.int32)
        for step in self._steps:
            buckets = buckets + (distance >= step).to(torch.int32)
        inputs = (hidden.to(weights[0].dtype), mask, *weights)
        return (functional_call(self.layer, {"buckets": buckets}, inputs),)


def text_layer(plan: StepPlan, dtype: torch.dtype) -> Compiled:
    """One layer of the text encoder; all its weights are inputs, in `dtype`."""
    config, length = plan.preset.text, plan.preset.dit.text_len
    shapes = umt5_shapes(config)
    hidden = tensor_spec("hidden", (length, config.d_model), torch.float32)
    inputs = [hidden, tensor_spec("mask", (length,), torch.float32)]
    inputs += [tensor_spec(name, shapes[f"layers.0.{name}"], dtype) for name in LAYER_WEIGHTS]
    outputs = [hidden.model_copy(update={"name": "hidden_out"})]
    return Compiled(_TextLayer(config, length), inputs, outputs)


class _Condition(nn.Module):
    def __init__(self, module: ConditionerModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, text: Tensor) -> tuple[Tensor, ...]:
        keys, values = self.module(text)
        return (*keys, *values)


def conditioner(config: DiTConfig, dtype: torch.dtype) -> Compiled:
    """Cross-attention keys and values of every layer from a prompt embedding."""
    with torch.device("meta"):
        model = CausalWanModel(config).to(dtype).requires_grad_(False)
    body = _Condition(ConditionerModule(model))
    inputs = [tensor_spec("text", (config.text_len, config.text_dim), torch.float32)]
    shape = (config.text_len, config.heads, config.head_dim)
    outputs = [tensor_spec(name, shape, dtype) for name in body.module.output_names]
    return Compiled(body, inputs, outputs, weights_of(body, "module.", _CONDITIONED))


_CONDITIONED = re.compile(r"model\.(text_embedding\..*|blocks\.\d+\.cross_attn\.(k|v|norm_k)\..*)")
"""The transformer's weights that the conditioner reads."""


def weights_of(body: nn.Module, prefix: str, wanted: re.Pattern[str]) -> dict[str, str]:
    """Parameters of `body` -> their names without `prefix`, as `Compiled` takes them; of those that are wanted."""
    names = {key: key.removeprefix(prefix) for key, _ in body.named_parameters()}
    return {key: name for key, name in names.items() if wanted.fullmatch(name)}
