"""Sparse Forcing: lists of key blocks with frames that everybody sees, and which blocks outlive the window."""

from __future__ import annotations

import triton
import triton.language as tl

from .select import best, count_present, ordered, write_list

__all__ = ["persist", "select_pinned", "weigh"]

_ABSENT = tl.constexpr(-(1 << 31))
_PINNED = tl.constexpr((1 << 31) - 1)


@triton.jit(do_not_specialize=["chunk_frames", "past_frames", "k_blocks", "key_blocks", "table_entries"])
def select_pinned(
    lists,
    counts,
    scores,
    frame_slots,
    chunk,
    keep_q20,
    pinned,
    chunk_frames,
    past_frames,
    k_blocks,
    key_blocks,
    table_entries,
    FRAMES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The kept key blocks of one (query block, head), ascending, and how many: grid (query_blocks, heads).

    All of the `pinned` oldest frames, and the best of the others; the budget counts these alone.
    """
    row = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    present = count_present(frame_slots, past_frames, FRAMES)
    frames = present + chunk_frames
    shown = tl.minimum(tl.maximum(tl.load(pinned), 0), present)
    local = (frames - shown) * k_blocks
    entry = tl.minimum(tl.maximum(tl.load(chunk), 0), table_entries - 1)
    keep = ((tl.load(keep_q20 + entry).to(tl.int64) * local) >> 20).to(tl.int32)
    keep = tl.where(present == 0, local, tl.minimum(tl.maximum(keep, 1), local)) + shown * k_blocks

    place = tl.arange(0, FRAMES * BLOCKS)
    frame = place // BLOCKS
    block = place % BLOCKS
    exists = (frame < frames) & (block < k_blocks)
    value = tl.load(scores + row * key_blocks + frame * k_blocks + block, mask=exists, other=0.0)
    key = tl.where(exists, tl.where(frame < shown, _PINNED, ordered(value)), _ABSENT)
    write_list(lists + row * key_blocks, counts + row, key, keep, BLOCKS)


@triton.jit(
    do_not_specialize=["chunk_frames", "past_frames", "query_blocks", "k_blocks", "key_blocks", "peak"]
)
def weigh(
    importance,
    scores,
    frame_slots,
    chunk_frames,
    past_frames,
    query_blocks,
    k_blocks,
    key_blocks,
    scale,
    peak,
    FRAMES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """importance[head, key block] = its weights in the chunk's query blocks, their sum or their peak: grid (heads).

    Weights are the softmax of the scaled scores over all resident blocks. `COLUMNS`, a power of two, covers them.
    """
    head = tl.program_id(0)
    present = count_present(frame_slots, past_frames, FRAMES)
    column = tl.arange(0, COLUMNS)
    inside = column < (present + chunk_frames) * k_blocks
    amount = tl.zeros([COLUMNS], tl.float32)
    for first in tl.range(0, query_blocks, ROWS):
        row = first + tl.arange(0, ROWS)
        there = row < query_blocks
        starts = (head * query_blocks + row).to(tl.int64) * key_blocks
        value = tl.load(
            scores + starts[:, None] + column[None, :],
            mask=there[:, None] & inside[None, :],
            other=0.0,
        )
        logits = tl.where(inside[None, :], value * scale, float("-inf"))
        weights = tl.exp(logits - tl.max(logits, 1)[:, None])
        weights = tl.where(there[:, None], weights / tl.sum(weights, 1)[:, None], 0.0)
        largest = tl.maximum(amount, tl.max(weights, 0))
        amount = tl.where(peak != 0, largest, amount + tl.sum(weights, 0))
    tl.store(importance + head * key_blocks + column, amount, mask=inside)


@triton.jit(
    do_not_specialize=[
        "heads",
        "frame_tokens",
        "k_blocks",
        "key_blocks",
        "block_k",
        "sink_frames",
        "shared_heads",
    ]
)
def persist(
    past_k,
    past_v,
    past_kmean,
    importance,
    frame_slots,
    contest,
    heads,
    frame_tokens,
    k_blocks,
    key_blocks,
    block_k,
    sink_frames,
    shared_heads,
    HEAD_DIM: tl.constexpr,
    CONTENDERS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One place of the persistent set, (place, head): what stands there stays, or a block that leaves takes it.

    `contest` has the frames that are kept and those that leave; both lie behind the sinks, in this order. Blocks
    compete with those of their size. Every program makes the whole choice for itself, because none can wait for
    another: then choosing and moving are one launch, over as many thread blocks as there are places. What is read lies
    in frames that leave, what is written in others. Grid (key_blocks, heads), of which places have something to do.

    Keys and values are moved as 16-bit integers, so one image serves every 16-bit type.
    """
    place = tl.program_id(0)
    head = tl.program_id(1)
    kept = tl.load(contest)
    places = kept * k_blocks
    contenders = places + tl.load(contest + 1) * k_blocks
    if (place >= places) | (contenders == places):
        return
    whole = frame_tokens // block_k
    block = place % k_blocks
    short = block >= whole
    index = tl.arange(0, CONTENDERS)
    contends = (index < contenders) & ((index % k_blocks >= whole) == short)
    value = tl.zeros([CONTENDERS], tl.float32)
    first_head = tl.where(shared_heads != 0, 0, head)
    for other in tl.range(first_head, tl.where(shared_heads != 0, heads, head + 1)):
        marks = importance + other * key_blocks + sink_frames * k_blocks
        value += tl.load(marks + index, mask=contends, other=0.0)
    key = tl.where(contends, ordered(value), _ABSENT)
    keep = kept * tl.where(short, k_blocks - whole, whole)

    own = tl.max(tl.where(index == place, key, _ABSENT), 0)
    ahead = tl.sum(((key > own) | ((key == own) & (index < place))).to(tl.int32), 0)
    if ahead < keep:
        return
    stays, _ = best(key, keep)
    lost = contends & (stays == 0) & (index < place)
    enters = stays & (index >= places)
    order = tl.cumsum(enters.to(tl.int32), 0) - 1
    turn = tl.sum(lost.to(tl.int32), 0)
    source = tl.sum(tl.where(enters & (order == turn), index, 0), 0)

    to_slot = tl.load(frame_slots + sink_frames + place // k_blocks).to(tl.int64)
    from_slot = tl.load(frame_slots + sink_frames + source // k_blocks).to(tl.int64)
    from_block = source % k_blocks
    stride = heads * HEAD_DIM
    column = head * HEAD_DIM + tl.arange(0, HEAD_DIM)
    target = (to_slot * frame_tokens + block * block_k) * stride
    origin = (from_slot * frame_tokens + from_block * block_k) * stride
    tokens = tl.minimum(block_k, frame_tokens - block * block_k)
    for first in tl.range(0, tokens, TILE):
        row = first + tl.arange(0, TILE)
        offset = row[:, None] * stride + column[None, :]
        inside = (row < tokens)[:, None]
        tl.store(past_k + target + offset, tl.load(past_k + origin + offset, mask=inside), mask=inside)
        tl.store(past_v + target + offset, tl.load(past_v + origin + offset, mask=inside), mask=inside)
    mean = tl.load(past_kmean + (from_slot * k_blocks + from_block) * stride + column)
    tl.store(past_kmean + (to_slot * k_blocks + block) * stride + column, mean)
