"""Attention over blocks whose tokens a table names, and lists of blocks that follow from tables.

Tiles and patches of a frame are no runs of consecutive tokens. An *order* cuts a frame's tokens into blocks of their
own: int32 `[blocks, size]`, the tokens of each block first, then -1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attend import load_if, load_rows, store_rows
from .select import BLOCK_BITS, count_present

__all__ = ["attend_ordered", "expand"]

_ENTRY_BITS = tl.constexpr(BLOCK_BITS)
_ENTRY_MASK = tl.constexpr((1 << BLOCK_BITS) - 1)


@triton.jit(do_not_specialize=["heads", "frame_tokens", "past_frames", "q_blocks", "key_blocks", "block_k"])
def attend_ordered(
    out,
    q,
    k,
    v,
    past_k,
    past_v,
    frame_slots,
    lists,
    counts,
    q_order,
    k_order,
    heads,
    frame_tokens,
    past_frames,
    q_blocks,
    key_blocks,
    block_k,
    scale,
    HEAD_DIM: tl.constexpr,
    Q_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    V_TILE: tl.constexpr,
    FRAMES: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """As `attend`, for blocks of the orders `q_order` and `k_order`: grid (query_blocks, heads).

    `Q_TILE` is the query block. A step takes the next `K_TILE` keys of the list, of part of an entry or of several.
    """
    query_block = tl.program_id(0)
    head = tl.program_id(1)
    present = count_present(frame_slots, past_frames, FRAMES)
    stride = heads * HEAD_DIM
    column = tl.arange(0, HEAD_DIM)
    value_column = tl.arange(0, V_TILE)

    query = tl.load(q_order + (query_block % q_blocks) * Q_TILE + tl.arange(0, Q_TILE))
    query_inside = query >= 0
    query_base = ((query_block // q_blocks) * frame_tokens).to(tl.int64) * stride + head * HEAD_DIM
    query_row = tl.maximum(query, 0) * stride
    q_tile = load_rows(q + query_base + query_row[:, None] + column[None, :], query_inside, False)
    to_log2 = scale * 1.4426950408889634
    if INTERPRET:  # the interpreter's bfloat16 matrix product is wrong
        q_tile = q_tile.to(tl.float32)

    row = (head * tl.num_programs(0) + query_block).to(tl.int64)
    entries = lists + row * key_blocks
    listed = tl.load(counts + row)
    keys = listed * block_k
    lane = tl.arange(0, K_TILE)

    best = tl.full([Q_TILE], float("-inf"), tl.float32)
    norm = tl.zeros([Q_TILE], tl.float32)
    acc = tl.zeros([Q_TILE, V_TILE], tl.float32)
    acc_high = tl.zeros([Q_TILE, V_TILE], tl.float32)
    for first in tl.range(0, keys, K_TILE, num_stages=STAGES):
        index = (first + lane) // block_k
        taken = index < listed
        entry = load_if(entries + index, taken, INTERPRET)
        frame = entry >> _ENTRY_BITS
        at = (entry & _ENTRY_MASK) * block_k + (first + lane) % block_k
        token = tl.where(taken, load_if(k_order + at, taken, INTERPRET), -1)
        key_inside = token >= 0
        past = frame < present
        slot = load_if(frame_slots + frame, past & taken, INTERPRET)
        key = tl.where(past, slot, frame - present).to(tl.int64) * frame_tokens + tl.maximum(token, 0)
        base = key * stride + head * HEAD_DIM
        k_rows = tl.where(past, past_k, k) + base
        v_rows = tl.where(past, past_v, v) + base

        k_tile = load_rows(k_rows[:, None] + column[None, :], key_inside, False)
        if INTERPRET:
            k_tile = k_tile.to(tl.float32)
        logits = tl.dot(q_tile, tl.trans(k_tile))
        logits = tl.where(key_inside[None, :], logits, float("-inf"))
        # The first entry's first key is one, so `new_best` is finite from the first step on.
        new_best = tl.maximum(best, tl.max(logits, 1) * to_log2)
        weights = tl.exp2(logits * to_log2 - new_best[:, None])
        decay = tl.exp2(best - new_best)
        norm = norm * decay + tl.sum(weights, 1)
        best = new_best

        weights = weights.to(v.dtype.element_ty)
        v_tile = load_rows(v_rows[:, None] + value_column[None, :], key_inside, False)
        if INTERPRET:
            weights = weights.to(tl.float32)
            v_tile = v_tile.to(tl.float32)
        acc = tl.dot(weights, v_tile, acc * decay[:, None])
        if V_TILE < HEAD_DIM:
            v_tile = load_rows(v_rows[:, None] + V_TILE + value_column[None, :], key_inside, False)
            if INTERPRET:
                v_tile = v_tile.to(tl.float32)
            acc_high = tl.dot(weights, v_tile, acc_high * decay[:, None])

    # An empty list leaves zeros.
    inverse = 1.0 / tl.where(norm > 0, norm, 1.0)[:, None]
    o_pointers = out + query_base + query_row[:, None] + value_column[None, :]
    store_rows(o_pointers, (acc * inverse).to(out.dtype.element_ty), query_inside, False)
    if V_TILE < HEAD_DIM:
        store_rows(o_pointers + V_TILE, (acc_high * inverse).to(out.dtype.element_ty), query_inside, False)


@triton.jit(
    do_not_specialize=[
        "chunk_frames",
        "past_frames",
        "q_blocks",
        "k_blocks",
        "key_blocks",
        "map_heads",
        "map_rows",
        "map_columns",
    ]
)
def expand(
    lists,
    counts,
    frame_slots,
    frame_map,
    block_map,
    columns,
    chunk_frames,
    past_frames,
    q_blocks,
    k_blocks,
    key_blocks,
    map_heads,
    map_rows,
    map_columns,
    FRAMES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The key blocks that tables give one (query block, head), ascending, and how many: grid (query_blocks, heads).

    `frame_map[present, head, query frame, frame]` names a map, or -1 for none of the frame's blocks; a row of
    `block_map[map]` says of each column whether it is seen, and `columns` which column each block of a frame has.
    Heads take the heads of `frame_map` in turns, as rows of lists take those of a map.
    """
    row = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    present = count_present(frame_slots, past_frames, FRAMES)
    frame = tl.arange(0, FRAMES)
    query_frame = tl.program_id(0) // q_blocks
    at = (present * map_heads + tl.program_id(1) % map_heads) * chunk_frames + query_frame
    resident = frame < present + chunk_frames
    chosen = tl.load(frame_map + at * (past_frames + chunk_frames) + frame, mask=resident, other=-1)

    block = tl.arange(0, BLOCKS)
    column = tl.load(columns + block, mask=block < k_blocks, other=0)
    inside = (chosen >= 0)[:, None] & (block < k_blocks)[None, :]
    cell = (chosen.to(tl.int64) * map_rows + row % map_rows)[:, None] * map_columns + column[None, :]
    seen = tl.load(block_map + cell, mask=inside, other=0) != 0

    size: tl.constexpr = FRAMES * BLOCKS
    seen = tl.reshape(seen.to(tl.int32), [size])
    position = tl.cumsum(seen, 0) - 1
    place = tl.arange(0, size)
    packed = ((place // BLOCKS) << _ENTRY_BITS) | (place % BLOCKS)
    tl.store(lists + row * key_blocks + position, packed, mask=seen != 0)
    tl.store(counts + row, tl.sum(seen, 0))
