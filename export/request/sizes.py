"""The sizes of a model in closed form: weights, convolutions and caches, from its configuration alone.

Nothing here needs PyTorch. The tests hold every figure to the model's real tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Protocol

from lightforcing_ref.dimensions import TAEConfig

from .targets import Precision, Variant

if TYPE_CHECKING:
    from lightforcing_ref.config import DiTConfig, Preset
    from lightforcing_ref.dimensions import DecoderConfig, VAEConfig
    from lightforcing_ref.text import UMT5Config

__all__ = [
    "CONDITIONER_LINEARS",
    "Conv",
    "Linear",
    "Sized",
    "conditioner_parameters",
    "decoder_convs",
    "decoder_parameters",
    "encoder_convs",
    "encoder_parameters",
    "item_bytes",
    "layer_linears",
    "layer_vectors",
    "step_parameters",
    "text_layer_parameters",
    "text_outer_parameters",
    "transformer_parameters",
]


class Sized(Protocol):
    """A model, its variant and the size of its video in pixels: a `StepPlan`, or a request."""

    @property
    def preset(self) -> Preset: ...
    @property
    def variant(self) -> Variant: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...


TAE_BLOCKS = 3
"""Memory blocks in a stage of a tiny decoder."""

HISTORY = 2
"""Past frames that a causal convolution of the decoder keeps."""

CONDITIONER_LINEARS = ("cross_attn.k", "cross_attn.v")
"""Linears of a block that run once per prompt."""

_FP4_BLOCK = 16


@dataclass(frozen=True)
class Linear:
    """A linear of a transformer block, `[out, in]`, without its bias."""

    kind: str
    rows: int
    columns: int

    @property
    def elements(self) -> int:
        return self.rows * self.columns

    def bytes(self, precision: Precision) -> int:
        """Size of the weight with its scales."""
        wide = item_bytes(precision)
        match precision:
            case "fp8":
                return self.elements + wide * self.rows
            case "nvfp4":
                return self.elements // 2 + self.elements // _FP4_BLOCK + wide * self.rows
            case _:
                return wide * self.elements


def item_bytes(precision: Precision) -> int:
    """Bytes of an element of what is not quantized."""
    return 4 if precision == "fp32" else 2


# ---- transformer ----


@cache
def layer_linears(dit: DiTConfig) -> tuple[Linear, ...]:
    """The linears of one block, in the order they run; the last two belong to the conditioner."""
    dim, ffn = dit.dim, dit.ffn_dim
    return (
        Linear("self_attn.qkv", 3 * dim, dim),
        Linear("self_attn.o", dim, dim),
        Linear("cross_attn.q", dim, dim),
        Linear("cross_attn.o", dim, dim),
        Linear("ffn.0", ffn, dim),
        Linear("ffn.2", dim, ffn),
        *(Linear(kind, dim, dim) for kind in CONDITIONER_LINEARS),
    )


def layer_vectors(dit: DiTConfig) -> int:
    """Elements of one block's biases and norms in the step graph: those of cross k and v are the conditioner's."""
    biases = 3 * dit.dim + 4 * dit.dim + dit.ffn_dim  # qkv; o, q, o and ffn.2; ffn.0
    norms = 3 * dit.dim + 2 * dit.dim  # q, k of self-attention and q of cross-attention; norm3
    return biases + norms


def step_parameters(dit: DiTConfig, rows: int) -> int:
    """Elements of the step graph's weights that are not in a block linear: vectors, embeddings, folded modulations.

    `rows` are those of the modulation tables, one for each kind of forward.
    """
    patch = prod(dit.patch) * dit.channels
    tables = rows * 6 * dit.dim * dit.layers + rows * 2 * dit.dim
    embedding, head = dit.dim * patch + dit.dim, patch * dit.dim + patch
    return dit.layers * layer_vectors(dit) + tables + embedding + head


def conditioner_parameters(dit: DiTConfig) -> int:
    """Elements of the conditioner's weights that are not in a block linear."""
    embedding = dit.dim * dit.text_dim + dit.dim + dit.dim * dit.dim + dit.dim
    return embedding + dit.layers * 3 * dit.dim  # biases of k and v, norm of k


def transformer_parameters(dit: DiTConfig) -> int:
    """Parameters of the checkpoint: what a step graph with one row of modulations has, and the time embedding."""
    dim = dit.dim
    linears = dit.layers * sum(linear.elements for linear in layer_linears(dit))
    time = dim * dit.freq_dim + dim + dim * dim + dim + 6 * dim * dim + 6 * dim
    return linears + step_parameters(dit, rows=1) + conditioner_parameters(dit) + time


# ---- text encoder ----


def text_layer_parameters(text: UMT5Config) -> int:
    """Elements of one layer of the text encoder."""
    inner = text.heads * text.d_kv
    return (
        4 * inner * text.d_model + 3 * text.d_ff * text.d_model + text.buckets * text.heads + 2 * text.d_model
    )


def text_outer_parameters(text: UMT5Config) -> int:
    """Elements outside of the layers: token table and final norm."""
    return text.vocab * text.d_model + text.d_model


# ---- video decoder ----


@dataclass(frozen=True)
class Conv:
    """A convolution of the streaming decoder or encoder.

    Attributes:
        kernel: (time, height, width).
        scale: pixels per latent pixel, in height and in width, of its output.
        frames: output frames per latent frame after the first.
        cache_scale: pixels per latent pixel of the cache of its input; None = it has none.
        only_later: whether the first latent frame bypasses it.
        first_frames: output frames of the first latent frame.
        memory: channels of the frame before that it sees, in a tiny decoder; None = the cache is a causal history.
        history: past frames of its input in the cache.
    """

    inputs: int
    outputs: int
    kernel: tuple[int, int, int]
    scale: int
    frames: int
    cache_scale: int | None = None
    only_later: bool = False
    first_frames: int = 1
    memory: int | None = None
    bias: bool = True
    history: int = HISTORY

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs * prod(self.kernel) + (self.outputs if self.bias else 0)

    def cache_shape(self, height: int, width: int) -> tuple[int, ...] | None:
        """`[1, channels, 2, h, w]` for latents of `height` x `width`; a memory's `[1, channels, h, w]`."""
        if self.cache_scale is None:
            return None
        size = self.cache_scale * height, self.cache_scale * width
        return (1, self.inputs, self.history, *size) if self.memory is None else (1, self.memory, *size)

    def pixels(self, height: int, width: int, *, first: bool = False) -> int:
        """Output pixels for one latent frame of `height` x `width`."""
        return height * width * self.scale**2 * (self.first_frames if first else self.frames)

    def flops(self, height: int, width: int, *, first: bool = False) -> int:
        """Multiplications and additions for one latent frame of `height` x `width`."""
        if first and self.only_later:
            return 0
        return 2 * self.inputs * self.outputs * prod(self.kernel) * self.pixels(height, width, first=first)


def _residual(inputs: int, outputs: int, scale: int, frames: int) -> Iterator[Conv]:
    cube = (3, 3, 3)
    yield Conv(inputs, outputs, cube, scale, frames, cache_scale=scale)
    yield Conv(outputs, outputs, cube, scale, frames, cache_scale=scale)
    if inputs != outputs:
        yield Conv(inputs, outputs, (1, 1, 1), scale, frames)


def decoder_convs(decoder: DecoderConfig) -> tuple[Conv, ...]:
    """Every convolution of the decoder; those with a cache in the order of the caches."""
    return _tae_convs(decoder) if isinstance(decoder, TAEConfig) else _wan_convs(decoder)


def _tae_convs(tae: TAEConfig) -> tuple[Conv, ...]:
    square, point = (1, 3, 3), (1, 1, 1)
    convs = [Conv(tae.z_dim, tae.widths[0], square, 1, 1)]
    scale = frames = 1
    for stage, (width, outputs) in enumerate(zip(tae.widths, tae.widths[1:], strict=False)):
        for _ in range(TAE_BLOCKS):
            convs.append(Conv(2 * width, width, square, scale, frames, scale, False, frames, width))
            convs += 2 * [Conv(width, width, square, scale, frames, first_frames=frames)]
        scale *= 2
        # Behind the last memory, the first latent frame goes on with its last pixel frame alone.
        is_last = stage == len(tae.widths) - 2
        grown = 2 if tae.temporal_upsample[stage] else 1
        for outs, kernel, repeated in ((grown * width, point, 1), (outputs, square, grown)):
            frames *= repeated
            kept = 1 if is_last else frames
            convs.append(Conv(width, outs, kernel, scale, frames, first_frames=kept, bias=False))
    convs.append(Conv(tae.widths[-1], 3, square, scale, frames))
    return tuple(convs)


def _wan_convs(vae: VAEConfig) -> tuple[Conv, ...]:
    middle, *stages = vae.widths
    cube, point = (3, 3, 3), (1, 1, 1)
    convs = [Conv(vae.z_dim, vae.z_dim, point, 1, 1), Conv(vae.z_dim, middle, cube, 1, 1, cache_scale=1)]
    convs += _residual(middle, middle, 1, 1)
    convs += (Conv(middle, 3 * middle, point, 1, 1), Conv(middle, middle, point, 1, 1))
    convs += _residual(middle, middle, 1, 1)
    width, scale, frames = middle, 1, 1
    for stage, outputs in enumerate(stages):
        for _ in range(vae.num_res_blocks + 1):
            convs += _residual(width, outputs, scale, frames)
            width = outputs
        if stage < len(vae.temporal_upsample):
            if vae.temporal_upsample[stage]:
                convs.append(
                    Conv(width, 2 * width, (3, 1, 1), scale, frames, cache_scale=scale, only_later=True)
                )
                frames *= 2
            scale *= 2
            convs.append(Conv(width, width // 2, (1, 3, 3), scale, frames))
            width //= 2
    convs.append(Conv(width, 3, cube, scale, frames, cache_scale=scale))
    return tuple(convs)


def decoder_parameters(vae: DecoderConfig) -> int:
    """Parameters of the decoder: convolutions and, of Wan's, the weights of the norms before them."""
    if isinstance(vae, TAEConfig):
        return sum(conv.parameters for conv in decoder_convs(vae))
    middle, *stages = vae.widths
    norms, width = 2 * 2 * middle + middle, middle  # two residual blocks and the attention in the middle
    for stage, outputs in enumerate(stages):
        norms += width + outputs + vae.num_res_blocks * 2 * outputs
        width = outputs // 2 if stage < len(vae.temporal_upsample) else outputs
    return sum(conv.parameters for conv in decoder_convs(vae)) + norms + width


def encoder_convs(vae: VAEConfig) -> tuple[Conv, ...]:
    """Every convolution of Wan's encoder; those with a cache in the order of the caches."""
    stages = vae.widths[:0:-1]
    middle, cube, point = stages[-1], (3, 3, 3), (1, 1, 1)
    scale, frames, width = vae.spatial_factor, vae.temporal_factor, vae.dim
    convs = [Conv(3, width, cube, scale, frames, cache_scale=scale)]
    for stage, outputs in enumerate(stages):
        for _ in range(vae.num_res_blocks):
            convs += _residual(width, outputs, scale, frames)
            width = outputs
        if stage < len(vae.temporal_upsample):
            scale //= 2
            convs.append(Conv(width, width, (1, 3, 3), scale, frames))
            if vae.temporal_upsample[-1 - stage]:
                frames //= 2
                halved = Conv(width, width, (3, 1, 1), scale, frames, scale, only_later=True, history=1)
                convs.append(halved)
    convs += _residual(middle, middle, 1, 1)
    convs += (Conv(middle, 3 * middle, point, 1, 1), Conv(middle, middle, point, 1, 1))
    convs += _residual(middle, middle, 1, 1)
    convs.append(Conv(middle, 2 * vae.z_dim, cube, 1, 1, cache_scale=1))
    return (*convs, Conv(2 * vae.z_dim, 2 * vae.z_dim, point, 1, 1))


def encoder_parameters(vae: VAEConfig) -> int:
    """Parameters of Wan's encoder: convolutions, and the weights of the norms before them."""
    middle = vae.widths[1]
    norms, width = 2 * 2 * middle + middle + middle, vae.dim
    for outputs in vae.widths[:0:-1]:
        norms += width + outputs + (vae.num_res_blocks - 1) * 2 * outputs
        width = outputs
    return sum(conv.parameters for conv in encoder_convs(vae)) + norms
