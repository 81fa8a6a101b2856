# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""A simple block-sparse attention kernel in Triton: one program per query block and head, no tuning."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["block_attention"]


@triton.jit
def _sparse_attention(
    out,
    q,
    k,
    v,
    chosen,
    kept,
    heads,
    frame_tokens,
    q_blocks,
    k_blocks,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    query_block, head = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, HEAD_DIM)
    stride = heads * HEAD_DIM

    row = (query_block % q_blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row_inside = row < frame_tokens
    token = (query_block // q_blocks) * frame_tokens + row
    q_offset = token[:, None].to(tl.int64) * stride + head * HEAD_DIM + column[None, :]
    query = tl.load(q + q_offset, mask=row_inside[:, None], other=0.0)

    best = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_Q], tl.float32)
    total = tl.zeros([BLOCK_Q, HEAD_DIM], tl.float32)
    entries = chosen + (head * tl.num_programs(0) + query_block) * kept
    for index in range(kept):
        block = tl.load(entries + index)
        key = (block % k_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        key_inside = key < frame_tokens
        key_token = (block // k_blocks) * frame_tokens + key
        k_offset = key_token[:, None].to(tl.int64) * stride + head * HEAD_DIM + column[None, :]
        key_tile = tl.load(k + k_offset, mask=key_inside[:, None], other=0.0)
        logits = tl.dot(query, tl.trans(key_tile)) * (scale * 1.4426950408889634)
        logits = tl.where(key_inside[None, :], logits, float("-inf"))
        new_best = tl.maximum(best, tl.max(logits, 1))
        weights = tl.exp2(logits - new_best[:, None])
        decay = tl.exp2(best - new_best)
        norm = norm * decay + tl.sum(weights, 1)
        value_tile = tl.load(v + k_offset, mask=key_inside[:, None], other=0.0)
        total = tl.dot(weights.to(value_tile.dtype), value_tile, total * decay[:, None])
        best = new_best
    total /= norm[:, None]
    tl.store(out + q_offset, total.to(out.dtype.element_ty), mask=row_inside[:, None])


def block_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    chosen: Tensor,
    frame_tokens: int,
    block_q: int,
    block_k: int,
    scale: float,
) -> Tensor:
    """Softmax attention of each query block over its chosen key blocks.

    Args:
        q: `[T, H, D]`; keys, values: `[frames * frame_tokens, H, D]`, all contiguous.
        chosen: int32 `[H, query blocks, kept]`, logical block indices.
    """
    tokens, heads, head_dim = q.shape
    out = torch.empty_like(q)
    q_blocks, k_blocks = -(-frame_tokens // block_q), -(-frame_tokens // block_k)
    grid = (tokens // frame_tokens * q_blocks, heads)
    _sparse_attention[grid](
        out, q, keys, values, chosen.contiguous(), chosen.shape[-1], heads, frame_tokens, q_blocks, k_blocks, scale,
        HEAD_DIM=head_dim, BLOCK_Q=block_q, BLOCK_K=block_k,
        num_warps=8 if block_q >= 128 else 4, num_stages=2,
    )  # fmt: skip
    return out
