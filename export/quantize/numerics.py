"""The number formats of quantized linears, in PyTorch: what is folded into the weights, and what the graph computes.

FP8 is E4M3 (largest value 448). Weights have one scale per output channel, activations one per token (dynamic) or one
per tensor (static).

NVFP4 is E2M1 (largest value 6) in blocks of 16 along the input dimension, each block with an E4M3 scale, and above it
one scale per output channel and per token. (ModelOpt has one per tensor there. With one per channel and token, block
scales use E4M3's range to the full, and no calibration is needed.) The scale of a block of activations maps its largest
value to 6, as TensorRT computes it. That of a block of weights is searched for: E2M1 has few values between 3 and 6, so
a block is often nearer to them with its largest value at 4 or 5, or cut off at 6. What counts is the squared error of
the output, so errors are weighed by the mean square of the inputs they meet, where a calibration knows it.

Everything is computed in float32. `post` is the vector that undoes weight scale (and static activation scale) after
the matrix product; it is rounded to the graph's type first and the weights are quantized with what is left of it, so
the rounding of a scale is no error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "FP4_BLOCK",
    "FoldedWeight",
    "Format",
    "dequantize_weight",
    "fake_activation",
    "fake_linear",
    "fold_weight",
    "importance_of",
    "input_reciprocal",
    "pack_fp4",
    "relative_error",
    "to_e2m1",
    "to_e4m3",
]

Format = Literal["fp8", "nvfp4"]

FP8_MAX = 448.0
FP4_MAX = 6.0
FP4_BLOCK = 16
"""Elements that share a block scale in NVFP4."""

RANGE: dict[Format, float] = {"fp8": FP8_MAX, "nvfp4": FP4_MAX * FP8_MAX}
"""Largest magnitude a format holds before its outer scale: of an element, times that of a block scale."""

_DIVISORS = (6.0, 4.0, 4.5, 5.0, 5.5, 6.5, 7.0, 7.5)
"""What the largest weight of a block may be mapped to. Of equally good ones, the first is taken."""

_WEIGHT_RANGE: dict[Format, float] = {"fp8": FP8_MAX, "nvfp4": min(_DIVISORS) * FP8_MAX}
"""As `RANGE`, for weights, whose block scales must reach further."""

_EXPONENT = 0x7F800000
"""The exponent's bits of float32."""

_ROWS = 32
"""Of a weight, whose scales are searched for at a time."""

_LEAST_IMPORTANCE = 1e-3
"""Of an input channel, against the mean of all: one that was silent in a calibration may speak later."""

SMALLEST_SCALE = 2.0**-64
"""Floor of a dynamic scale, so that a token of zeros is not divided by zero; exact in every float type but float16."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Midpoints; every other one goes up, to the even code.
_E2M1_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_E2M1_TIES_UP = (1, 3, 5)


def to_e4m3(x: Tensor) -> Tensor:
    """Round to E4M3 (nearest even, saturating)."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def to_e2m1(x: Tensor) -> Tensor:
    """Round float32 to E2M1 (nearest even, saturating); uint8 codes 0..15, the sign in bit 3."""
    bounds = torch.tensor(_E2M1_BOUNDS)
    for index in _E2M1_TIES_UP:
        bounds[index] = torch.nextafter(bounds[index], torch.tensor(0.0))
    magnitude = torch.bucketize(x.abs(), bounds, out_int32=True).to(torch.uint8)
    return magnitude | (torch.signbit(x).to(torch.uint8) << 3)


def _from_e2m1(codes: Tensor) -> Tensor:
    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    return values[codes.int()]


def pack_fp4(codes: Tensor) -> Tensor:
    """Two codes per byte along the last dimension, the first one in the low half, as ONNX stores FLOAT4E2M1."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def _rounded_blocks(x: Tensor) -> Tensor:
    """`x` `[..., K]`, at most `RANGE` large, as NVFP4 holds it with the largest value of each block at 6."""
    blocks = x.reshape(*x.shape[:-1], -1, FP4_BLOCK)
    magnitude = blocks.abs()
    scales = to_e4m3(magnitude.amax(-1, keepdim=True) / FP4_MAX).float()
    # By a scale of zero, zeros.
    values = _nearest_e2m1(magnitude / torch.where(scales > 0, scales, torch.inf)).mul_(scales)
    return torch.copysign(values, blocks).flatten(-2)


def _divided(blocks: Tensor, scales: Tensor) -> Tensor:
    """Blocks `[..., 16]` by their scales `[...]`; by a scale of zero, zeros."""
    wide = scales.float()[..., None]
    return torch.where(wide > 0, blocks / wide, torch.zeros(()))


def _searched_blocks(x: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Quantize `x` `[N, K]` with the scale of each block that has the least squared error: (codes `[N, K]`, E4M3 block
    scales `[N, K / 16]`).

    Args:
        importance: weight of each column's error, `[K]`; None = all alike.
    """
    # A few rows at a time stay in the processor's cache.
    starts = range(0, len(x), _ROWS)
    scales = torch.cat([_best_scales(x[start : start + _ROWS], importance) for start in starts])
    blocks = x.reshape(*x.shape[:-1], -1, FP4_BLOCK)
    return to_e2m1(_divided(blocks, scales)).flatten(-2), scales


def _best_scales(x: Tensor, importance: Tensor | None) -> Tensor:
    """The block scales of `_searched_blocks`."""
    magnitude = x.abs().reshape(*x.shape[:-1], -1, FP4_BLOCK)
    weigh = None if importance is None else importance.reshape(-1, FP4_BLOCK)
    largest = magnitude.amax(-1)
    best, scales = torch.full_like(largest, torch.inf), torch.zeros_like(largest)
    for divisor in _DIVISORS:
        tried = to_e4m3(largest / divisor).float()
        # By a scale of zero, zeros.
        divided = magnitude / torch.where(tried > 0, tried, torch.inf)[..., None]
        errors = _nearest_e2m1(divided).mul_(tried[..., None]).sub_(magnitude).square_()
        total = (errors if weigh is None else errors.mul_(weigh)).sum(-1)
        scales = torch.where(total < best, tried, scales)
        best = torch.minimum(best, total)
    return scales.to(torch.float8_e4m3fn)


def _nearest_e2m1(magnitude: Tensor) -> Tensor:
    """The E2M1 values nearest to `magnitude`, which `to_e2m1` gives the codes of; float32, at least 0; in place."""
    magnitude.clamp_(max=FP4_MAX)
    # The power of two at or below each value, from its exponent's bits: half of it is the spacing there, and below 1.
    power = magnitude.clamp(min=1.0).view(torch.int32).bitwise_and_(_EXPONENT).view(torch.float32)
    # Beside so large a number, float32 has no digits below the spacing: what is added to it is rounded to even.
    large = power.mul_(0.5 * 1.5 * 2**23)
    return magnitude.add_(large).sub_(large)


def _from_blocks(codes: Tensor, scales: Tensor) -> Tensor:
    values = _from_e2m1(codes).reshape(*scales.shape, FP4_BLOCK)
    return (values * scales.float()[..., None]).flatten(-2)


@dataclass(frozen=True)
class FoldedWeight:
    """A quantized weight `[N, K]`.

    Args:
        values: E4M3 `[N, K]`, or for NVFP4 uint8 codes `[N, K]`.
        block_scales: E4M3 `[N, K / 16]`, NVFP4 only.
        post: `[N]` in the graph's type: weight scale times static activation scale.
    """

    values: Tensor
    block_scales: Tensor | None
    post: Tensor


def input_reciprocal(amax: float, dtype: torch.dtype) -> Tensor:
    """What a static FP8 activation is multiplied by before it is rounded, `[1]` in the graph's type."""
    return torch.tensor([FP8_MAX / amax], dtype=torch.float32).to(dtype)


def importance_of(rms: Sequence[float]) -> Tensor:
    """How much the error of each input channel's weights matters, `[K]`, from the channels' root mean squares."""
    squares = torch.tensor(rms, dtype=torch.float32).square()
    return squares.clamp_min(_LEAST_IMPORTANCE * float(squares.mean()))


def fold_weight(
    weight: Tensor,
    format: Format,
    *,
    dtype: torch.dtype = torch.float32,
    amax: float | None = None,
    importance: Tensor | None = None,
) -> FoldedWeight:
    """Quantize `weight` `[N, K]` (K a multiple of 16 for NVFP4).

    Args:
        dtype: type of `post`, that of the graph's activations.
        amax: static range of the input activations, for FP8; None = dynamic.
        importance: of the input channels, `[K]`, for NVFP4; see `importance_of`.
    """
    wide = weight.float()
    input_scale = 1.0 if amax is None else 1.0 / float(input_reciprocal(amax, dtype))
    largest = wide.abs().amax(dim=1)
    # A channel of zeros keeps scale 1.
    scale = torch.where(largest > 0, largest / _WEIGHT_RANGE[format], torch.ones(()))
    post = (scale * input_scale).to(dtype)
    scaled = wide / (post.float() / input_scale)[:, None]
    if format == "fp8":
        return FoldedWeight(to_e4m3(scaled), None, post)
    codes, block_scales = _searched_blocks(scaled, importance)
    return FoldedWeight(codes, block_scales, post)


def dequantize_weight(folded: FoldedWeight) -> Tensor:
    """The weight before `post` is applied, float32 `[N, K]`."""
    if folded.block_scales is None:
        return folded.values.float()
    return _from_blocks(folded.values, folded.block_scales)


def fake_activation(
    x: Tensor, format: Format, *, amax: float | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Quantize activations `[..., K]` in float32: (quantized values, scale per token that undoes it, or 1).

    Args:
        amax: static range, for FP8 (its scale is then part of the weight's `post`); None = one scale per token.
        dtype: the graph's type, in which a static scale is stored.
    """
    wide = x.float()
    if amax is not None:
        return to_e4m3(wide * input_reciprocal(amax, dtype).float()).float(), torch.ones(())
    scale = (wide.abs().amax(-1, keepdim=True) / RANGE[format]).clamp_min(SMALLEST_SCALE)
    scaled = wide / scale
    if format == "fp8":
        return to_e4m3(scaled).float(), scale
    return _rounded_blocks(scaled), scale


def fake_linear(x: Tensor, folded: FoldedWeight, format: Format, *, amax: float | None = None) -> Tensor:
    """The quantized linear without its bias, `[..., K]` -> float32 `[..., N]`: what the graph computes."""
    quantized, scale = fake_activation(x, format, amax=amax, dtype=folded.post.dtype)
    return quantized @ dequantize_weight(folded).T * scale * folded.post.float()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference over the L2 norm of `expected`."""
    gap, scale = (actual.double() - expected.double()).norm(), expected.double().norm()
    return float(gap / scale) if scale else float(gap)
