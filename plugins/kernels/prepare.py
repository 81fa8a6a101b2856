"""QKPrepare on the GPU: bias, RMS norm, RoPE and block means in one pass over the merged projection."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["prepare", "prepare_scaled", "projected", "rotated_rows"]


@triton.jit
def projected(source, mask, stride, here, column, shift, token_scale, alive, factor, SCALED: tl.constexpr):
    """Rows `here` of the projection from `source` on, with its bias `shift`, float32; zeros outside of `mask`.

    With `SCALED`, what was projected is a product of codes: each row is multiplied by its token's scale, from
    `token_scale` on, and each column by `factor`.
    """
    x = tl.load(source + here[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        by_token = tl.load(token_scale + here, mask=alive, other=0.0).to(tl.float32)
        x = x * by_token[:, None] * factor[None, :]
    return tl.where(mask, x + shift[None, :], 0.0)


@triton.jit
def rotated_rows(
    x,
    weight,
    here,
    alive,
    cos_base,
    sin_base,
    width,
    eps,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """RMS norm over the full width and rotation of rows `here` of a block, float32 `[ROWS, WIDTH]`.

    Rows that are not `alive` and columns past `width` must be zero, and stay so.
    """
    angle = tl.arange(0, HEAD_DIM // 2)
    rms = tl.rsqrt(tl.sum(x * x, 1) / width + eps)
    scaled = x * rms[:, None] * weight[None, :]
    even, odd = tl.split(tl.reshape(scaled, [ROWS, WIDTH // HEAD_DIM, HEAD_DIM // 2, 2]))
    turn = here[:, None] * (HEAD_DIM // 2) + angle[None, :]
    c = tl.load(cos_base + turn, mask=alive[:, None], other=0.0)[:, None, :]
    s = tl.load(sin_base + turn, mask=alive[:, None], other=0.0)[:, None, :]
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [ROWS, WIDTH])


@triton.jit
def _prepare_block(
    q,
    k,
    v,
    q_mean,
    k_mean,
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
    SCALED: tl.constexpr,
):
    """One block of one frame for q, k or v: grid (chunk_frames * max(q_blocks, k_blocks), 3).

    A program owns whole rows, so the norm over the full width needs no second kernel, and a whole block, so its
    mean is summed in a fixed order without atomics. `WIDTH` is `heads * HEAD_DIM` rounded up to a power of two.
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

    if role == 2:
        target = v + token0 * width
        for first in tl.range(0, rows_here, ROWS, num_stages=STAGES):
            here = first + row
            alive = here < rows_here
            mask = alive[:, None] & inside[None, :]
            x = projected(source, mask, 3 * width, here, column, shift, by_token, alive, factor, SCALED)
            tl.store(target + here[:, None] * width + column[None, :], x.to(v.dtype.element_ty), mask=mask)
    else:
        target = tl.where(role == 0, q, k) + token0 * width
        weight = tl.load(tl.where(role == 0, norm_q, norm_k) + column, mask=inside, other=0.0).to(tl.float32)
        cos_base = cos + token0 * (HEAD_DIM // 2)
        sin_base = sin + token0 * (HEAD_DIM // 2)
        total = tl.zeros([WIDTH], tl.float32)
        for first in tl.range(0, rows_here, ROWS, num_stages=STAGES):
            here = first + row
            alive = here < rows_here
            mask = alive[:, None] & inside[None, :]
            x = projected(source, mask, 3 * width, here, column, shift, by_token, alive, factor, SCALED)
            turned = rotated_rows(
                x, weight, here, alive, cos_base, sin_base, width, eps, HEAD_DIM, WIDTH, ROWS
            )
            rounded = turned.to(q.dtype.element_ty)
            tl.store(target + here[:, None] * width + column[None, :], rounded, mask=mask)
            total += tl.sum(rounded.to(tl.float32), 0)
        mean = tl.where(role == 0, q_mean, k_mean) + index.to(tl.int64) * width
        tl.store(mean + column, total / rows_here, mask=inside)


@triton.jit(
    do_not_specialize=["heads", "frame_tokens", "block_q", "block_k", "q_blocks", "k_blocks", "chunk_frames"]
)
def prepare(
    q,
    k,
    v,
    q_mean,
    k_mean,
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
):
    """One block of one frame for q, k or v: grid (chunk_frames * max(q_blocks, k_blocks), 3)."""
    _prepare_block(
        q, k, v, q_mean, k_mean, qkv, qkv, qkv, bias, norm_q, norm_k, cos, sin,
        heads, frame_tokens, block_q, block_k, q_blocks, k_blocks, chunk_frames, eps,
        HEAD_DIM, WIDTH, ROWS, STAGES, SCALED=False,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["heads", "frame_tokens", "block_q", "block_k", "q_blocks", "k_blocks", "chunk_frames"]
)
def prepare_scaled(
    q,
    k,
    v,
    q_mean,
    k_mean,
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
):
    """As `prepare`, of a product of codes that its scales have yet to be applied to."""
    _prepare_block(
        q, k, v, q_mean, k_mean, qkv, token_scale, channel_scale, bias, norm_q, norm_k, cos, sin,
        heads, frame_tokens, block_q, block_k, q_blocks, k_blocks, chunk_frames, eps,
        HEAD_DIM, WIDTH, ROWS, STAGES, SCALED=True,
    )  # fmt: skip
