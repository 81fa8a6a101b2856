"""Block-sparse flash attention over lists of key blocks."""

from __future__ import annotations

import triton
import triton.language as tl

from .select import BLOCK_BITS, count_present

__all__ = ["attend", "load_if", "load_rows", "store_rows"]

_ENTRY_BITS = tl.constexpr(BLOCK_BITS)
_ENTRY_MASK = tl.constexpr((1 << BLOCK_BITS) - 1)


@triton.jit
def load_if(pointer, wanted, INTERPRET: tl.constexpr):
    """int32 at `pointer` where `wanted`, else 0.

    Written in PTX because Triton's pipeliner spends a stage of the loop on every `tl.load` that feeds the address
    of another: with such loads in front of the keys, a three-stage loop would prefetch one step ahead, not two.
    """
    if INTERPRET:
        return tl.load(pointer, mask=wanted, other=0)
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.nc.b32 $0, [$1]; }",
        "=r,l,r",
        [pointer.to(tl.uint64), wanted.to(tl.int32)],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def load_rows(pointers, inside, EVEN: tl.constexpr):
    """A tile, of which rows that are not `inside` are zero; `EVEN`: all are."""
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=inside[:, None], other=0)


@triton.jit
def store_rows(pointers, value, inside, EVEN: tl.constexpr):
    """Write the rows of a tile that are `inside`; `EVEN`: all are."""
    if EVEN:
        tl.store(pointers, value)
    else:
        tl.store(pointers, value, mask=inside[:, None])


@triton.jit(do_not_specialize=["heads", "frame_tokens", "past_frames", "q_blocks", "key_blocks", "block_k"])
def attend(
    out,
    q,
    k,
    v,
    past_k,
    past_v,
    frame_slots,
    lists,
    counts,
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
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One query block of one head over its listed key blocks: grid (query_blocks, heads).

    `Q_TILE` is the query block. A key block of 1, 2 or 4 times `K_TILE` tokens is walked in steps of `K_TILE`.
    `EVEN`: blocks divide the frame, so nothing needs a mask. `V_TILE` is `HEAD_DIM`, or half of it where warps
    would otherwise be laid across the columns of the output instead of its rows (64 query rows on mma.sync).
    """
    query_block = tl.program_id(0)
    head = tl.program_id(1)
    present = count_present(frame_slots, past_frames, FRAMES)
    stride = heads * HEAD_DIM
    column = tl.arange(0, HEAD_DIM)
    value_column = tl.arange(0, V_TILE)

    query = (query_block % q_blocks) * Q_TILE + tl.arange(0, Q_TILE)
    query_inside = query < frame_tokens
    query_base = ((query_block // q_blocks) * frame_tokens).to(tl.int64) * stride + head * HEAD_DIM
    q_tile = load_rows(q + query_base + query[:, None] * stride + column[None, :], query_inside, EVEN)
    to_log2 = scale * 1.4426950408889634
    if INTERPRET:  # the interpreter's bfloat16 matrix product is wrong
        q_tile = q_tile.to(tl.float32)

    row = (head * tl.num_programs(0) + query_block).to(tl.int64)
    entries = lists + row * key_blocks
    # log2(block_k / K_TILE) for the ratios 1, 2 and 4.
    shift = block_k // K_TILE >> 1
    steps = tl.load(counts + row) << shift
    key = tl.arange(0, K_TILE)
    key_offset = key[:, None] * stride + column[None, :]
    value_offset = key[:, None] * stride + value_column[None, :]

    best = tl.full([Q_TILE], float("-inf"), tl.float32)
    norm = tl.zeros([Q_TILE], tl.float32)
    acc = tl.zeros([Q_TILE, V_TILE], tl.float32)
    acc_high = tl.zeros([Q_TILE, V_TILE], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        entry = load_if(entries + (step >> shift), step < steps, INTERPRET)
        frame = entry >> _ENTRY_BITS
        start = (entry & _ENTRY_MASK) * block_k + (step & ((1 << shift) - 1)) * K_TILE
        past = frame < present
        slot = load_if(frame_slots + frame, past, INTERPRET)
        token = tl.where(past, slot, frame - present).to(tl.int64) * frame_tokens + start
        base = token * stride + head * HEAD_DIM
        k_base = tl.where(past, past_k, k) + base
        v_base = tl.where(past, past_v, v) + base

        key_inside = key < frame_tokens - start
        k_tile = load_rows(k_base + key_offset, key_inside, EVEN)
        if INTERPRET:
            k_tile = k_tile.to(tl.float32)
        logits = tl.dot(q_tile, tl.trans(k_tile))
        if not EVEN:
            logits = tl.where(key_inside[None, :], logits, float("-inf"))
        # The first step of a block always has a key inside the frame, so `new_best` is finite from then on.
        new_best = tl.maximum(best, tl.max(logits, 1) * to_log2)
        weights = tl.exp2(logits * to_log2 - new_best[:, None])
        decay = tl.exp2(best - new_best)
        norm = norm * decay + tl.sum(weights, 1)
        best = new_best

        weights = weights.to(v.dtype.element_ty)
        v_tile = load_rows(v_base + value_offset, key_inside, EVEN)
        if INTERPRET:
            weights = weights.to(tl.float32)
            v_tile = v_tile.to(tl.float32)
        acc = tl.dot(weights, v_tile, acc * decay[:, None])
        if V_TILE < HEAD_DIM:
            v_tile = load_rows(v_base + V_TILE + value_offset, key_inside, EVEN)
            if INTERPRET:
                v_tile = v_tile.to(tl.float32)
            acc_high = tl.dot(weights, v_tile, acc_high * decay[:, None])

    # An empty list leaves zeros.
    inverse = 1.0 / tl.where(norm > 0, norm, 1.0)[:, None]
    o_pointers = out + query_base + query[:, None] * stride + value_column[None, :]
    store_rows(o_pointers, (acc * inverse).to(out.dtype.element_ty), query_inside, EVEN)
    if V_TILE < HEAD_DIM:
        store_rows(o_pointers + V_TILE, (acc_high * inverse).to(out.dtype.element_ty), query_inside, EVEN)
