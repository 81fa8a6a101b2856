"""Keys and values in eight bits, from the projection on: E4M3 with a scale for every block and head.

Keys are stored less the mean of their block, which the cache holds anyway for the selection: what is left of
neighbouring tokens is smaller than they are, and so are its rounding errors. With s the scale of a block and m its
mean, a key is `s * code + m`, and its logit `s * (q . code) + q . m`, so products may be taken with the codes.
Values have a scale and no mean. The definition is in docs/operators.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import hsa_attention, qk_prepare

__all__ = [
    "E4M3_MAX",
    "SMALLEST_SCALE",
    "KVFormat",
    "dequantize_blocks",
    "hsa_attention_fp8",
    "oracles",
    "per_token",
    "qk_prepare_fp8",
    "quantize_blocks",
    "with_fp8_cache",
]

KVFormat = Literal["fp8"]
"""How keys and values are held, where it is not the compute type."""

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
        q, k, v, q_mean, k_mean, k_scale, v_scale: k and v are codes `[T, H, D]`, the scales float32
        `[frames, k_blocks, H]`, everything else as `qk_prepare` gives it.
    """
    q, k, v, q_mean, k_mean = qk_prepare(
        qkv, bias, norm_q, norm_k, cos, sin,
        heads=heads, frame_tokens=frame_tokens, block_q=block_q, block_k=block_k, eps=eps,
    )  # fmt: skip
    frames = (-1, frame_tokens)
    k_codes, k_scale = quantize_blocks(k.unflatten(0, frames), block_k, k_mean)
    v_codes, v_scale = quantize_blocks(v.unflatten(0, frames), block_k)
    return q, k_codes.flatten(0, 1), v_codes.flatten(0, 1), q_mean, k_mean, k_scale, v_scale


def with_fp8_cache(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An attention over keys and values, as one over codes: with what they stand for, in float32."""

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
            dequantize_blocks(k.unflatten(0, frames), k_scale, block_k, k_mean).flatten(0, 1),
            dequantize_blocks(v.unflatten(0, frames), v_scale, block_k).flatten(0, 1),
            q_mean,
            k_mean,
            dequantize_blocks(past_k, past_kscale, block_k, past_kmean),
            dequantize_blocks(past_v, past_vscale, block_k),
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


def oracles(kv: KVFormat | None) -> tuple[Callable[..., tuple[Tensor, ...]], Callable[..., Tensor]]:
    """Preparation and attention over keys and values as `kv` says; None = in the compute type."""
    return (qk_prepare, hsa_attention) if kv is None else (qk_prepare_fp8, hsa_attention_fp8)
