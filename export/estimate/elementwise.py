"""Element-wise work in closed form: the passes between matrix products, attention and convolutions, and their bytes.

A pass is one kernel that reads every input once and writes every output once. Passes are fused as far as compilers do
it: what can be computed row by row from the outputs of one product up to the inputs of the next is one pass. The
quantization of a product's input is part of the pass that makes the input; where the input comes out of attention, it
is a pass of its own. Parameters (norms, biases, modulations) are a few kilobytes and are left out, and so is the
selection of key blocks. Nothing here needs PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from export.request.sizes import HISTORY, TAE_BLOCKS, item_bytes, layer_linears
from lightforcing_ref.dimensions import TAEConfig

if TYPE_CHECKING:
    from export.request.targets import Precision
    from lightforcing_ref.config import DiTConfig
    from lightforcing_ref.dimensions import DecoderConfig, VAEConfig
    from lightforcing_ref.sparsity import BlockGeometry

__all__ = ["Pass", "StepPasses", "activation_bytes", "decoder_passes"]

_SCALE = 4
"""Bytes of a scale, of one token's activations or of one block's keys or values, float32."""
_FP4_BLOCK = 16
_LATENT = 4
"""Latents and noise are float32."""


@dataclass(frozen=True)
class Pass:
    """One kernel: what it does, and the bytes it reads and writes."""

    name: str
    read: int
    written: int

    @property
    def bytes(self) -> int:
        return self.read + self.written


def activation_bytes(precision: Precision, tokens: int, width: int) -> int:
    """Bytes of the input `[tokens, width]` of a block linear, with its scales."""
    elements = tokens * width
    match precision:
        case "fp8":
            return elements + _SCALE * tokens
        case "nvfp4":
            return elements // 2 + elements // _FP4_BLOCK + _SCALE * tokens
        case _:
            return elements * item_bytes(precision)


class StepPasses:
    """The passes of one forward of one chunk, `tokens` long.

    Args:
        precision: of what is not quantized.
        linears: precision of every block linear, by name.
        codes: keys and values are in eight bits.
    """

    def __init__(
        self,
        dit: DiTConfig,
        geometry: BlockGeometry,
        tokens: int,
        precision: Precision,
        linears: Mapping[str, Precision],
        *,
        codes: bool = False,
    ) -> None:
        self._codes, self._linears = codes, linears
        self._dit, self._geometry, self._tokens, self._precision = dit, geometry, tokens, precision
        self._stream = tokens * dit.dim * item_bytes(precision)
        """Bytes of the residual stream, and of everything else that is as wide."""

    def _input(self, kind: str, layer: int) -> int:
        width = next(linear.columns for linear in layer_linears(self._dit) if linear.kind == kind)
        return activation_bytes(self._linears[f"blocks.{layer}.{kind}"], self._tokens, width)

    def _is_quantized(self, kind: str, layer: int) -> bool:
        return self._linears[f"blocks.{layer}.{kind}"] in ("fp8", "nvfp4")

    def first(self) -> Iterator[Pass]:
        """Before the first layer: patches out of the latent, and the first layer's norm."""
        patches = self._patches()
        yield Pass("patches", patches * _LATENT, patches * item_bytes(self._precision))
        yield Pass("norm, modulation", self._stream, self._input("self_attn.qkv", 0))

    def prepare(self) -> Pass:
        """Bias, norms, rotation and block means of a layer's queries and keys, out of the merged projection."""
        geometry, dit, frames = self._geometry, self._dit, self._tokens // self._geometry.frame_tokens
        tables = 2 * self._tokens * (dit.head_dim // 2) * 4
        means = frames * (geometry.q_blocks + geometry.k_blocks) * dit.dim * 4
        written = 3 * self._stream
        if self._codes:
            scales = 2 * frames * geometry.k_blocks * dit.heads * _SCALE
            values = frames * geometry.k_blocks * geometry.block_k  # in whole blocks
            written = self._stream + (self._tokens + values) * dit.dim + scales
        return Pass("prepare q, k, v", 3 * self._stream + tables, written + means)

    def layer(self, layer: int = 0) -> Iterator[Pass]:
        """From the attention output of the layer with this index to the input of the next one's projection, or of the
        head.
        """
        stream, ffn = self._stream, self._tokens * self._dit.ffn_dim * item_bytes(self._precision)
        if self._is_quantized("self_attn.o", layer):
            yield Pass("quantize attention", stream, self._input("self_attn.o", layer))
        yield Pass("residual, norm", 2 * stream, stream + self._input("cross_attn.q", layer))
        yield Pass("norm of cross q", stream, stream)
        if self._is_quantized("cross_attn.o", layer):
            yield Pass("quantize cross-attention", stream, self._input("cross_attn.o", layer))
        yield Pass("residual, norm, modulation", 2 * stream, stream + self._input("ffn.0", layer))
        yield Pass("GELU", ffn, self._input("ffn.2", layer))
        if layer == self._dit.layers - 1:
            yield Pass("residual, head's norm", 2 * stream, stream)
        else:
            yield Pass(
                "residual, norm, modulation", 2 * stream, stream + self._input("self_attn.qkv", layer + 1)
            )

    def last(self) -> Iterator[Pass]:
        """Behind the head: the flow back into a latent, and the scheduler's step."""
        latent = self._patches()
        read = latent * item_bytes(self._precision) + 2 * latent * _LATENT  # flow; latent and noise
        yield Pass("next latent", read, 2 * latent * _LATENT)

    def _patches(self) -> int:
        """Elements of a chunk's latent."""
        return self._tokens * prod(self._dit.patch) * self._dit.channels


# ---- the decoder ----


def decoder_passes(
    decoder: DecoderConfig, height: int, width: int, item: int, *, first: bool
) -> Iterator[Pass]:
    """The decoder's passes on one latent frame of `height` x `width`, elements of `item` bytes."""
    if isinstance(decoder, TAEConfig):
        return _tae_passes(decoder, height, width, item, first=first)
    return _wan_passes(decoder, height, width, item, first=first)


def _tae_passes(tae: TAEConfig, height: int, width: int, item: int, *, first: bool) -> Iterator[Pass]:
    """A tiny decoder's passes: activations go with the convolutions, and each block's sum with the next one's input.

    The first convolution of a block reads a frame beside the one before it, so the pass in front writes both.
    """
    area, frames = height * width, 1
    yield Pass("clamp", tae.z_dim * area * _LATENT, tae.z_dim * area * item)
    for stage, channels in enumerate(tae.widths[:-1]):
        frame = channels * area * item
        for block in range(TAE_BLOCKS):
            summands = 2 if block else 1
            read = frame * (summands * frames + (0 if first else 1))
            yield Pass("memory", read, frame * (2 * frames + 1))
        if first and stage == len(tae.widths) - 2:
            frames = 1
        yield Pass("enlarge", 2 * frame * frames, 4 * frame * frames)
        area *= 4
        if tae.temporal_upsample[stage]:
            frames *= 2
    colours = 3 * area * (1 if first else frames)
    yield Pass("to bytes", colours * item, colours)


def _wan_passes(vae: VAEConfig, height: int, width: int, item: int, *, first: bool) -> Iterator[Pass]:
    """The passes of Wan's decoder.

    A causal convolution reads its input behind two frames of history, so the pass before it writes both, and the new
    history. What a residual block adds up is added by the pass behind it.
    """
    walk = _Walk(height * width, item, first)
    middle, *stages = vae.widths
    yield walk.before_causal("denormalise", vae.z_dim)
    yield from walk.residual(middle, middle, summed=False)
    yield walk.before_frames("norm", middle, summed=True)
    yield from walk.residual(middle, middle, summed=True)
    channels = middle
    summed = True
    for stage, outputs in enumerate(stages):
        for _ in range(vae.num_res_blocks + 1):
            yield from walk.residual(channels, outputs, summed=summed)
            channels, summed = outputs, True
        if stage < len(vae.temporal_upsample):
            yield from walk.upsample(channels, temporal=vae.temporal_upsample[stage])
            channels, summed = channels // 2, False
    yield walk.before_causal("norm, SiLU", channels, summed=True)
    colours = 3 * walk.pixels
    yield Pass("to bytes", colours * item, colours)


class _Walk:
    """Where in the decoder one is: how many pixels a tensor has per channel."""

    def __init__(self, area: int, item: int, first: bool) -> None:
        self._area, self._item, self._first = area, item, first
        self._frames = 1

    @property
    def pixels(self) -> int:
        return self._area * self._frames

    def before_causal(self, name: str, channels: int, *, summed: bool = False, kept: bool = False) -> Pass:
        """A pass in front of a causal convolution.

        Args:
            summed: whether its input is still the two summands of a residual block.
            kept: whether the sum is written as well, for a residual.
        """
        history = HISTORY * self._area
        read = self.pixels * (2 if summed else 1) + (0 if self._first else history)
        written = self.pixels * (2 if kept else 1) + 2 * history
        return Pass(name, channels * read * self._item, channels * written * self._item)

    def before_frames(self, name: str, channels: int, *, summed: bool) -> Pass:
        """A pass in front of what has no history, whose input is kept for a residual."""
        elements = channels * self.pixels * self._item
        return Pass(name, elements * (2 if summed else 1), elements * (2 if summed else 1))

    def residual(self, inputs: int, outputs: int, *, summed: bool) -> Iterator[Pass]:
        yield self.before_causal("norm, SiLU", inputs, summed=summed, kept=summed)
        yield self.before_causal("norm, SiLU", outputs)

    def upsample(self, channels: int, *, temporal: bool) -> Iterator[Pass]:
        """Doubling height and width, after doubling the frames where that is due."""
        summed = 2
        if temporal and not self._first:
            yield self.before_causal("history", channels, summed=True)
            self._frames *= 2
            summed = 1
        small = channels * self.pixels * self._item
        yield Pass("enlarge", summed * small, 4 * small)
        self._area *= 4
