"""QKPrepare over codes: as `prepare`, and keys and values as E4M3 with a scale per block and head.

What it computes is in docs/operators.md, "Eight bits".
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fp8 import scale_of, to_codes
from .prepare import projected, rotated_rows

__all__ = ["prepare_fp8", "prepare_scaled_fp8"]

_VALUE_ROWS = tl.constexpr(32)
"""Tokens of a tile in which values are turned; every block is a multiple."""


@triton.jit
def _prepare_block(
    q,
    k,
    v,
    q_mean,
    k_mean,
    k_scale,
    v_scale,
    qkv,
    token_scale,
    channel_scale,
    bias,
    norm_q,
    norm_k,
    cos,
    sin,
    heads,
    frame_tokens,
    block_q,
    block_k,
    q_blocks,
    k_blocks,
    chunk_frames,
    eps,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    HARDWARE: tl.constexpr,
    SCALED: tl.constexpr,
):
    """As `prepare`, one block of one frame for q, k or v: grid (chunk_frames * max(q_blocks, k_blocks), 3).

    Keys and values are walked twice: for the mean and the largest magnitude, which the smallest and the largest
    value of each channel give, and, from the cache by then, for the codes. Those of values are written channel by
    channel, head after head, with zeros where a frame's last block is short.
    """
    role = tl.program_id(1)
    block = tl.where(role == 0, block_q, block_k)
    blocks = tl.where(role == 0, q_blocks, k_blocks)
    index = tl.program_id(0)
    if index >= chunk_frames * blocks:
        return
    frame = index // blocks
    start = (index % blocks) * block
    rows_here = tl.minimum(block, frame_tokens - start)

    width = heads * HEAD_DIM
    column = tl.arange(0, WIDTH)
    inside = column < width
    token0 = (frame * frame_tokens + start).to(tl.int64)
    source = qkv + token0 * (3 * width) + role * width
    shift = tl.load(bias + role * width + column, mask=inside, other=0.0).to(tl.float32)
    factor = shift
    if SCALED:
        factor = tl.load(channel_scale + role * width + column, mask=inside, other=0.0).to(tl.float32)
    by_token = token_scale + token0
    row = tl.arange(0, ROWS)
    weight = tl.load(tl.where(role == 0, norm_q, norm_k) + column, mask=inside, other=0.0).to(tl.float32)
    cos_base = cos + token0 * (HEAD_DIM // 2)
    sin_base = sin + token0 * (HEAD_DIM // 2)

    total = tl.zeros([WIDTH], tl.float32)
    low = tl.full([WIDTH], float("inf"), tl.float32)
    high = tl.full([WIDTH], float("-inf"), tl.float32)
    for first in tl.range(0, rows_here, ROWS, num_stages=STAGES):
        here = first + row
        alive = here < rows_here
        mask = alive[:, None] & inside[None, :]
        x = projected(source, mask, 3 * width, here, column, shift, by_token, alive, factor, SCALED)
        if role != 2:
            x = rotated_rows(x, weight, here, alive, cos_base, sin_base, width, eps, HEAD_DIM, WIDTH, ROWS)
        rounded = x.to(q.dtype.element_ty)
        if role == 0:
            tl.store(q + token0 * width + here[:, None] * width + column[None, :], rounded, mask=mask)
        wide = rounded.to(tl.float32)
        total += tl.sum(wide, 0)
        low = tl.minimum(low, tl.min(tl.where(alive[:, None], wide, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(alive[:, None], wide, float("-inf")), 0))
    mean = total / rows_here
    target = index.to(tl.int64) * width
    if role == 0:
        tl.store(q_mean + target + column, mean, mask=inside)
        return
    if role == 1:
        tl.store(k_mean + target + column, mean, mask=inside)
    else:
        mean = tl.zeros([WIDTH], tl.float32)
    largest = tl.where(inside, tl.maximum(high - mean, mean - low), 0.0)
    scale = scale_of(tl.max(tl.reshape(largest, [WIDTH // HEAD_DIM, HEAD_DIM]), 1))
    head = tl.arange(0, WIDTH // HEAD_DIM)
    scales = tl.where(role == 1, k_scale, v_scale) + index.to(tl.int64) * heads
    tl.store(scales + head, scale, mask=head < heads)
    if role == 1:
        by_column = tl.reshape(tl.broadcast_to(scale[:, None], [WIDTH // HEAD_DIM, HEAD_DIM]), [WIDTH])
        out = k + token0 * width
        for first in tl.range(0, rows_here, ROWS, num_stages=STAGES):
            here = first + row
            alive = here < rows_here
            mask = alive[:, None] & inside[None, :]
            x = projected(source, mask, 3 * width, here, column, shift, by_token, alive, factor, SCALED)
            x = rotated_rows(x, weight, here, alive, cos_base, sin_base, width, eps, HEAD_DIM, WIDTH, ROWS)
            x = (x.to(q.dtype.element_ty).to(tl.float32) - mean[None, :]) / by_column[None, :]
            tl.store(out + here[:, None] * width + column[None, :], to_codes(x, HARDWARE), mask=mask)
        return
    channel = tl.arange(0, HEAD_DIM)
    key = tl.arange(0, _VALUE_ROWS)
    block = block // _VALUE_ROWS * _VALUE_ROWS  # the same number, known to be a multiple
    for of_head in range(heads):
        head_scale = tl.sum(tl.where(head == of_head, scale, 0.0), 0)
        head_shift = tl.load(bias + 2 * width + of_head * HEAD_DIM + channel).to(tl.float32)
        head_factor = head_shift
        if SCALED:
            head_factor = tl.load(channel_scale + 2 * width + of_head * HEAD_DIM + channel).to(tl.float32)
        out = v + (index.to(tl.int64) * heads + of_head) * (HEAD_DIM * block)
        for first in range(0, block, _VALUE_ROWS):
            here = first + key
            alive = here < rows_here
            of = source + of_head * HEAD_DIM
            x = projected(
                of, alive[:, None], 3 * width, here, channel, head_shift, by_token, alive, head_factor, SCALED
            )
            x = x.to(q.dtype.element_ty).to(tl.float32) / head_scale
            codes = tl.trans(to_codes(x, HARDWARE))
            tl.store(out + channel[:, None] * block + here[None, :], codes)


@triton.jit(
    do_not_specialize=["heads", "frame_tokens", "block_q", "block_k", "q_blocks", "k_blocks", "chunk_frames"]
)
def prepare_fp8(
    q,
    k,
    v,
    q_mean,
    k_mean,
    k_scale,
    v_scale,
    qkv,
    bias,
    norm_q,
    norm_k,
    cos,
    sin,
    heads,
    frame_tokens,
    block_q,
    block_k,
    q_blocks,
    k_blocks,
    chunk_frames,
    eps,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """As `prepare`, keys and values as codes."""
    _prepare_block(
        q, k, v, q_mean, k_mean, k_scale, v_scale, qkv, qkv, qkv, bias, norm_q, norm_k, cos, sin,
        heads, frame_tokens, block_q, block_k, q_blocks, k_blocks, chunk_frames, eps,
        HEAD_DIM, WIDTH, ROWS, STAGES, HARDWARE, SCALED=False,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["heads", "frame_tokens", "block_q", "block_k", "q_blocks", "k_blocks", "chunk_frames"]
)
def prepare_scaled_fp8(
    q,
    k,
    v,
    q_mean,
    k_mean,
    k_scale,
    v_scale,
    qkv,
    token_scale,
    channel_scale,
    bias,
    norm_q,
    norm_k,
    cos,
    sin,
    heads,
    frame_tokens,
    block_q,
    block_k,
    q_blocks,
    k_blocks,
    chunk_frames,
    eps,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """As `prepare_fp8`, of a product of codes that its scales have yet to be applied to."""
    _prepare_block(
        q, k, v, q_mean, k_mean, k_scale, v_scale, qkv, token_scale, channel_scale, bias, norm_q, norm_k, cos, sin,
        heads, frame_tokens, block_q, block_k, q_blocks, k_blocks, chunk_frames, eps,
        HEAD_DIM, WIDTH, ROWS, STAGES, HARDWARE, SCALED=True,
    )  # fmt: skip
