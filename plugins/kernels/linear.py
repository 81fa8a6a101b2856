"""SLA's linear branch: what the keys of each frame make of the values, all frames together through the projection, and
what the queries read of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .select import count_present

__all__ = ["add_linear", "project_linear", "sum_linear"]

_EPSILON = tl.constexpr(1e-5)


@triton.jit
def _features(rows, inside):
    """Softmax over the columns of a tile in float32; zero in rows that are not `inside`."""
    wide = rows.to(tl.float32)
    powers = tl.exp(wide - tl.max(wide, 1)[:, None])
    return tl.where(inside[:, None], powers / tl.sum(powers, 1)[:, None], 0.0)


@triton.jit(do_not_specialize=["heads", "frame_tokens", "chunk_frames", "past_frames"])
def sum_linear(
    frame_state,
    frame_features,
    k,
    v,
    past_k,
    past_v,
    frame_slots,
    heads,
    frame_tokens,
    chunk_frames,
    past_frames,
    HEAD_DIM: tl.constexpr,
    FRAMES: tl.constexpr,
    TILE: tl.constexpr,
    V_TILE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """phi(K)^T V and the sum of phi(K) over one resident frame: grid (frames, heads, HEAD_DIM / V_TILE).

    `frame_state` is float32 `[frames, H, D, D]`, features of the key first, `frame_features` `[frames, H, D]`; nothing
    is written of absent frames. A program has `V_TILE` columns of the values.
    """
    frame = tl.program_id(0)
    head = tl.program_id(1)
    present = count_present(frame_slots, past_frames, FRAMES)
    if frame >= present + chunk_frames:
        return
    stride = heads * HEAD_DIM
    column = tl.arange(0, HEAD_DIM)
    value_column = tl.program_id(2) * V_TILE + tl.arange(0, V_TILE)
    past = frame < present
    slot = tl.load(frame_slots + frame, mask=past, other=0)
    base = tl.where(past, slot, frame - present).to(tl.int64) * frame_tokens * stride + head * HEAD_DIM
    keys = tl.where(past, past_k, k) + base
    values = tl.where(past, past_v, v) + base

    state = tl.zeros([HEAD_DIM, V_TILE], tl.float32)
    total = tl.zeros([HEAD_DIM], tl.float32)
    for first in tl.range(0, frame_tokens, TILE):
        row = first + tl.arange(0, TILE)
        inside = row < frame_tokens
        key = tl.load(keys + row[:, None] * stride + column[None, :], mask=inside[:, None], other=0.0)
        value = tl.load(
            values + row[:, None] * stride + value_column[None, :], mask=inside[:, None], other=0.0
        )
        # Rounded before they are summed, too: what the queries divide by belongs to the same numbers.
        features = _features(key, inside).to(v.dtype.element_ty)
        total += tl.sum(features.to(tl.float32), 0)
        if INTERPRET:  # the interpreter's bfloat16 matrix product is wrong
            features = features.to(tl.float32)
            value = value.to(tl.float32)
        state = tl.dot(tl.trans(features), value, state)

    index = (frame * heads + head).to(tl.int64) * HEAD_DIM
    tl.store(frame_state + (index + column)[:, None] * HEAD_DIM + value_column[None, :], state)
    if tl.program_id(2) == 0:
        tl.store(frame_features + index + column, total)


@triton.jit(do_not_specialize=["heads", "chunk_frames", "past_frames"])
def project_linear(
    linear_state,
    linear_features,
    frame_state,
    frame_features,
    linear_weight,
    frame_slots,
    heads,
    chunk_frames,
    past_frames,
    HEAD_DIM: tl.constexpr,
    FRAMES: tl.constexpr,
    TILE: tl.constexpr,
    D_TILE: tl.constexpr,
):
    """All frames together, projected: grid (heads, HEAD_DIM / TILE).

    `linear_state` is float32 `[H, D, D]`, features of the key first, then those that the projection gives;
    `linear_features` `[H, D]`. A program has `TILE` features of the key.
    """
    head = tl.program_id(0)
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    present = count_present(frame_slots, past_frames, FRAMES)
    column = tl.arange(0, HEAD_DIM)
    inner = tl.arange(0, D_TILE)
    frames = present + chunk_frames
    step = (heads * HEAD_DIM).to(tl.int64)

    total = tl.zeros([TILE], tl.float32)
    for frame in tl.range(0, frames):
        total += tl.load(frame_features + frame * step + head * HEAD_DIM + row)
    tl.store(linear_features + head * HEAD_DIM + row, total)

    result = tl.zeros([TILE, HEAD_DIM], tl.float32)
    for first in tl.range(0, HEAD_DIM, D_TILE):
        part = tl.zeros([TILE, D_TILE], tl.float32)
        place = (head * HEAD_DIM + row)[:, None] * HEAD_DIM + (first + inner)[None, :]
        for frame in tl.range(0, frames):
            part += tl.load(frame_state + frame * step * HEAD_DIM + place)
        weight = tl.load(linear_weight + column[:, None] * HEAD_DIM + (first + inner)[None, :]).to(tl.float32)
        # As in `score`: three TF32 products carry the full float32 mantissa.
        result = tl.dot(part, tl.trans(weight), result, input_precision="tf32x3")
    target = linear_state + (head * HEAD_DIM + row)[:, None] * HEAD_DIM + column[None, :]
    tl.store(target, result)


@triton.jit(do_not_specialize=["heads", "frame_tokens", "q_blocks", "block_q"])
def add_linear(
    out,
    q,
    linear_state,
    linear_features,
    linear_bias,
    heads,
    frame_tokens,
    q_blocks,
    block_q,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Add to `out` what a query block of a head reads of `linear_state`, and the bias: grid (query_blocks, heads).

    `out` holds the sparse branch, rounded to the compute type.
    """
    query_block = tl.program_id(0)
    head = tl.program_id(1)
    stride = heads * HEAD_DIM
    column = tl.arange(0, HEAD_DIM)
    start = (query_block % q_blocks) * block_q
    base = ((query_block // q_blocks) * frame_tokens).to(tl.int64) * stride + head * HEAD_DIM
    mixing = tl.load(linear_state + (head * HEAD_DIM + column)[:, None] * HEAD_DIM + column[None, :])
    mixing = mixing.to(q.dtype.element_ty)
    total = tl.load(linear_features + head * HEAD_DIM + column)
    bias = tl.load(linear_bias + column).to(tl.float32)
    if INTERPRET:
        mixing = mixing.to(tl.float32)
    for first in tl.range(0, tl.minimum(block_q, frame_tokens - start), TILE):
        row = start + first + tl.arange(0, TILE)
        inside = (row < frame_tokens) & (row < start + block_q)
        place = base + row[:, None] * stride + column[None, :]
        query = _features(tl.load(q + place, mask=inside[:, None], other=0.0), inside)
        rounded = query.to(q.dtype.element_ty)
        weight = tl.sum(rounded.to(tl.float32) * total[None, :], 1)
        if INTERPRET:
            rounded = rounded.to(tl.float32)
        read = tl.dot(rounded, mixing) / (weight + _EPSILON)[:, None] + bias[None, :]
        sparse = tl.load(out + place, mask=inside[:, None], other=0.0).to(tl.float32)
        tl.store(out + place, (sparse + read).to(out.dtype.element_ty), mask=inside[:, None])
