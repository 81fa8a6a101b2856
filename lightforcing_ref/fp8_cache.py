"""Keys and values in eight bits, from the projection on: E4M3 with a scale for every block and head.

Keys are stored less the mean of their block, which the cache holds anyway for the selection: what is left of
neighbouring tokens is smaller than they are, and so are its rounding errors. With s the scale of a block and m its
mean, a key is `s * code + m`, and its logit `s * (q . code) + q . m`, so products may be taken with the codes.
Values have a scale and no mean; their codes lie block by block, channel by channel, as products of eight bits take
them. With such products, queries and the weights of the softmax are rounded, too. The definition is in
docs/operators.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import hsa_attention, qk_prepare

__all__ = [
    "E4M3_MAX",
    "SMALLEST_SCALE",
    "KVFormat",
    "Products",
    "dequantize_blocks",
    "dequantize_values",
    "e4m3_attention",
    "hsa_attention_e4m3",
    "hsa_attention_fp8",
    "oracles",
    "per_token",
    "qk_prepare_fp8",
    "quantize_blocks",
    "quantize_values",
    "with_fp8_cache",
]

KVFormat = Literal["fp8"]
"""How keys and values are held, where it is not the compute type."""

Products = Literal["fp8"]
"""What attention multiplies, where it is not the compute type."""

E4M3_MAX = 448.0

SMALLEST_SCALE = 2.0**-24
"""Floor of a scale: a block of zeros is no division by zero, and ratios of two scales stay far from overflow."""


def per_token(x: Tensor, frame_tokens: int, block: int) -> Tensor:
    """What belongs to blocks, `[frames, blocks, ...]`, for each of their tokens: `[frames, frame_tokens, ...]`."""
    return x.repeat_interleave(block, dim=1)[:, :frame_tokens]


def quantize_blocks(x: Tensor, block: int, means: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize `x` `[frames, frame_tokens, H, D]` block by block, in float32.

    Args:
        means: float32 `[frames, blocks, H, D]`, taken from every token of its block first.

    Returns:
        The codes, uint8 like `x` (bits of E4M3, nearest even), and the scales, float32 `[frames, blocks, H]`.
    """
    frame_tokens = x.shape[1]
    wide = x.float()
    if means is not None:
        wide = wide - per_token(means, frame_tokens, block)
    largest = wide.abs().amax(-1)
    padding = -frame_tokens % block
    largest = F.pad(largest, (0, 0, 0, padding)).unflatten(1, (-1, block)).amax(2)
    scales = (largest / E4M3_MAX).clamp_min(SMALLEST_SCALE)
    scaled = wide / per_token(scales, frame_tokens, block)[..., None]
    codes = scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8), scales


def dequantize_blocks(codes: Tensor, scales: Tensor, block: int, means: Tensor | None = None) -> Tensor:
    """What `quantize_blocks` left of its input, float32 `[frames, frame_tokens, H, D]`."""
    frame_tokens = codes.shape[1]
    wide = codes.view(torch.float8_e4m3fn).float() * per_token(scales, frame_tokens, block)[..., None]
    return wide if means is None else wide + per_token(means, frame_tokens, block)


def quantize_values(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Quantize values `[frames, frame_tokens, H, D]` block by block.

    Returns:
        The codes, uint8 `[frames, blocks, H, D, block]`, zeros behind the last token of a frame, and the scales,
        float32 `[frames, blocks, H]`.
    """
    codes, scales = quantize_blocks(x, block)
    padded = F.pad(codes, (0, 0, 0, 0, 0, -x.shape[1] % block))
    return padded.unflatten(1, (-1, block)).permute(0, 1, 3, 4, 2).contiguous(), scales


def dequantize_values(codes: Tensor, scales: Tensor, frame_tokens: int) -> Tensor:
    """What `quantize_values` left of its input, float32 `[frames, frame_tokens, H, D]`."""
    by_token = codes.permute(0, 1, 4, 2, 3).flatten(1, 2)[:, :frame_tokens]
    return dequantize_blocks(by_token, scales, codes.shape[-1])


def qk_prepare_fp8(
    qkv: Tensor,
    bias: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    frame_tokens: int,
    block_q: int,
    block_k: int,
    eps: float,
) -> tuple[Tensor, ...]:
    """`qk_prepare`, whose rounded keys and values are then quantized.

    Returns:
        q, k, v, q_mean, k_mean, k_scale, v_scale: k is codes `[T, H, D]`, v codes `[frames, k_blocks, H, D, block_k]`,
        the scales float32 `[frames, k_blocks, H]`, everything else as `qk_prepare` gives it.
    """
    q, k, v, q_mean, k_mean = qk_prepare(
        qkv, bias, norm_q, norm_k, cos, sin,
        heads=heads, frame_tokens=frame_tokens, block_q=block_q, block_k=block_k, eps=eps,
    )  # fmt: skip
    frames = (-1, frame_tokens)
    k_codes, k_scale = quantize_blocks(k.unflatten(0, frames), block_k, k_mean)
    v_codes, v_scale = quantize_values(v.unflatten(0, frames), block_k)
    return q, k_codes.flatten(0, 1), v_codes, q_mean, k_mean, k_scale, v_scale


def with_fp8_cache(attend: Callable[..., Tensor], *, means_apart: bool = False) -> Callable[..., Tensor]:
    """An attention over keys and values, as one over codes: with what they stand for, in float32.

    Args:
        means_apart: keys are `[..., 2 D]`, what their codes stand for and the mean of their block, instead of sums.
    """

    def keys(codes: Tensor, scales: Tensor, block: int, means: Tensor) -> Tensor:
        if not means_apart:
            return dequantize_blocks(codes, scales, block, means)
        return torch.cat(
            (dequantize_blocks(codes, scales, block), per_token(means, codes.shape[1], block)), -1
        )

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_mean: Tensor,
        k_mean: Tensor,
        k_scale: Tensor,
        v_scale: Tensor,
        past_k: Tensor,
        past_v: Tensor,
        past_kmean: Tensor,
        past_kscale: Tensor,
        past_vscale: Tensor,
        frame_slots: Tensor,
        chunk: Tensor | int,
        *,
        frame_tokens: int,
        block_k: int,
        **attributes: Any,
    ) -> Tensor:
        frames = (-1, frame_tokens)
        return attend(
            q,
            keys(k.unflatten(0, frames), k_scale, block_k, k_mean).flatten(0, 1),
            dequantize_values(v, v_scale, frame_tokens).flatten(0, 1),
            q_mean,
            k_mean,
            keys(past_k, past_kscale, block_k, past_kmean),
            dequantize_values(past_v, past_vscale, frame_tokens),
            past_kmean,
            frame_slots,
            chunk,
            frame_tokens=frame_tokens,
            block_k=block_k,
            **attributes,
        )

    return attention


hsa_attention_fp8 = with_fp8_cache(hsa_attention)
"""The operator `HierarchicalSparseAttentionFP8`: `hsa_attention` over codes."""


WEIGHT_BITS = 8
"""A weight of 1 is rounded as 2^8, the largest power of two that is a code."""


def _rounded(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn).float()


def e4m3_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """As `dense_attention`, with queries and weights rounded to E4M3; keys `[K, H, 2 D]` as codes and means apart.

    A query has a scale of its own, as a block of keys has; its product with means is of the query as it is. Weights
    are rounded relative to the power of two at or above the largest, and normalised by what they were before.
    """
    query, key, value = (x.float().transpose(0, 1) for x in (q, k, v))
    residual, mean = key.chunk(2, -1)
    size = (query.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp_min(SMALLEST_SCALE)
    rounded = _rounded(query / size) * size
    logits = (rounded @ residual.transpose(1, 2) + query @ mean.transpose(1, 2)) * (scale * math.log2(math.e))
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    weights = torch.exp2(logits - logits.amax(-1, keepdim=True).ceil() + WEIGHT_BITS)
    out = _rounded(weights) @ value / weights.sum(-1, keepdim=True)
    return out.transpose(0, 1).to(q.dtype)


hsa_attention_e4m3 = with_fp8_cache(partial(hsa_attention, attend=e4m3_attention), means_apart=True)
"""The operator `HierarchicalSparseAttentionE4M3`: `hsa_attention` over codes, with products of eight bits."""


def oracles(
    kv: KVFormat | None, products: Products | None = None
) -> tuple[Callable[..., tuple[Tensor, ...]], Callable[..., Tensor]]:
    """Preparation and attention over keys and values as `kv` says, with products as `products` says; None = in the
    compute type.
    """
    if kv is None:
        return qk_prepare, hsa_attention
    return qk_prepare_fp8, hsa_attention_fp8 if products is None else hsa_attention_e4m3
