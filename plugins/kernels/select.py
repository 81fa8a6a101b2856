"""Block selection of hierarchical sparse attention: scores, then frame and block top-k into ascending lists."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["BLOCK_BITS", "BLOCK_MASK", "best", "count_present", "ordered", "score", "select", "write_list"]

BLOCK_BITS = 16
"""A list entry is `frame << BLOCK_BITS | block`: logical frame (past oldest first, then current), block in it."""
BLOCK_MASK = (1 << BLOCK_BITS) - 1

_ABSENT = tl.constexpr(-(1 << 31))
_REJECTED = tl.constexpr(-(1 << 31) + 1)
_ENTRY_BITS = tl.constexpr(BLOCK_BITS)


@triton.jit
def count_present(frame_slots, past_frames, FRAMES: tl.constexpr):
    """Number of past frames that are there: valid entries of `frame_slots` come first, then -1."""
    index = tl.arange(0, FRAMES)
    slots = tl.load(frame_slots + index, mask=index < past_frames, other=-1)
    return tl.sum((slots >= 0).to(tl.int32), 0)


@triton.jit(do_not_specialize=["heads", "chunk_frames", "past_frames", "q_blocks", "k_blocks", "key_blocks"])
def score(
    scores,
    q_mean,
    k_mean,
    past_kmean,
    frame_slots,
    heads,
    chunk_frames,
    past_frames,
    q_blocks,
    k_blocks,
    key_blocks,
    HEAD_DIM: tl.constexpr,
    FRAMES: tl.constexpr,
    Q_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    D_TILE: tl.constexpr,
):
    """scores[head, query block, logical key block] = q_mean . k_mean: grid (key tiles, query tiles, heads)."""
    present = count_present(frame_slots, past_frames, FRAMES)
    total = (present + chunk_frames) * k_blocks
    key = tl.program_id(0) * K_TILE + tl.arange(0, K_TILE)
    if tl.program_id(0) * K_TILE >= total:
        return
    query_blocks = chunk_frames * q_blocks
    query = tl.program_id(1) * Q_TILE + tl.arange(0, Q_TILE)
    head = tl.program_id(2)
    stride = heads * HEAD_DIM

    frame = key // k_blocks
    past = frame < present
    slot = tl.load(frame_slots + frame, mask=past, other=0)
    row = tl.where(past, slot, frame - present) * k_blocks + key % k_blocks
    keys = tl.where(past, past_kmean, k_mean) + row.to(tl.int64) * stride + head * HEAD_DIM
    queries = q_mean + query * stride + head * HEAD_DIM
    dim = tl.arange(0, D_TILE)
    result = tl.zeros([Q_TILE, K_TILE], tl.float32)
    for first in tl.range(0, HEAD_DIM, D_TILE):
        a = tl.load(
            queries[:, None] + (first + dim)[None, :], mask=(query < query_blocks)[:, None], other=0.0
        )
        b = tl.load(keys[:, None] + (first + dim)[None, :], mask=(key < total)[:, None], other=0.0)
        # Three TF32 products carry the full float32 mantissa: plain TF32 would reorder close scores.
        result = tl.dot(a, tl.trans(b), result, input_precision="tf32x3")
    target = scores + (head * query_blocks + query).to(tl.int64)[:, None] * key_blocks + key[None, :]
    tl.store(target, result, mask=(query < query_blocks)[:, None] & (key < total)[None, :])


@triton.jit
def ordered(x):
    """Map float32 to int32 so that integer order is the order of the floats; above `_ABSENT` and `_REJECTED`."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.maximum(bits ^ ((bits >> 31) & 0x7FFFFFFF), _REJECTED + 1)


@triton.jit
def best(key, keep):
    """Which are the `keep` largest of `key`, int32 `[n]`, and the place of each among these; equal ones by index."""
    # Exact threshold: the largest t with at least `keep` keys >= t, one bit at a time from the top.
    threshold = tl.where(tl.sum((key >= 0).to(tl.int32), 0) >= keep, 0, _ABSENT)
    for bit in tl.range(0, 31):
        raised = threshold | (1 << (30 - bit))
        threshold = tl.where(tl.sum((key >= raised).to(tl.int32), 0) >= keep, raised, threshold)

    # One scan carries both running counts: keys above the threshold (low half) and ties with it (high half).
    above = (key > threshold).to(tl.int32)
    tie = (key == threshold).to(tl.int32)
    running = tl.cumsum(above + (tie << 16), 0)
    above_before = running & 0xFFFF
    tie_before = running >> 16
    room = keep - tl.sum(above, 0)
    kept = (above != 0) | ((tie != 0) & (tie_before <= room))
    return kept, above_before + tl.minimum(tie_before, room) - 1


@triton.jit
def write_list(entries, count, key, keep, BLOCKS: tl.constexpr):
    """The `keep` largest of `key`, frames of `BLOCKS` blocks, as one row of the lists."""
    kept, position = best(key, keep)
    place = tl.arange(0, key.shape[0])
    packed = ((place // BLOCKS) << _ENTRY_BITS) | (place % BLOCKS)
    tl.store(entries + position, packed, mask=kept)
    tl.store(count, keep)


@triton.jit(
    do_not_specialize=[
        "chunk_frames",
        "past_frames",
        "k_blocks",
        "key_blocks",
        "table_entries",
        "keep_frames",
        "sink_frames",
        "near_frames",
    ]
)
def select(
    lists,
    counts,
    scores,
    frame_slots,
    chunk,
    keep_q20,
    chunk_frames,
    past_frames,
    k_blocks,
    key_blocks,
    table_entries,
    keep_frames,
    sink_frames,
    near_frames,
    FRAMES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The kept key blocks of one (query block, head), ascending, and how many: grid (query_blocks, heads).

    `FRAMES` and `BLOCKS` are powers of two that cover the resident frames and the key blocks of a frame.
    """
    row = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    present = count_present(frame_slots, past_frames, FRAMES)
    frames = present + chunk_frames
    total = frames * k_blocks
    entry = tl.minimum(tl.maximum(tl.load(chunk), 0), table_entries - 1)
    keep = ((tl.load(keep_q20 + entry).to(tl.int64) * total) >> 20).to(tl.int32)
    keep = tl.where(present == 0, total, tl.minimum(tl.maximum(keep, 1), total))

    frame = tl.arange(0, FRAMES)
    block = tl.arange(0, BLOCKS)
    exists = (frame < frames)[:, None] & (block < k_blocks)[None, :]
    index = frame[:, None] * k_blocks + block[None, :]
    value = tl.load(scores + row * key_blocks + index, mask=exists, other=0.0)

    # The dot product with a mean of block means is the mean of the block scores; the common factor 1 / k_blocks
    # does not change the order.
    frame_score = ordered(tl.sum(value, 1))
    candidate = (frame >= sink_frames) & (frame < present - near_frames)
    contest = tl.where(candidate, frame_score, _ABSENT)
    ahead = (contest[None, :] > contest[:, None]) | (
        (contest[None, :] == contest[:, None]) & (frame[None, :] < frame[:, None])
    )
    rank = tl.sum(ahead.to(tl.int32), 1)
    chosen = (candidate == 0) | (rank < keep_frames - sink_frames - near_frames) | (present <= keep_frames)

    # Rejected blocks are all equal, below every other: a budget beyond the eligible ones takes them in their order.
    key = tl.where(exists, tl.where(chosen[:, None], ordered(value), _REJECTED), _ABSENT)
    write_list(lists + row * key_blocks, counts + row, tl.reshape(key, [FRAMES * BLOCKS]), keep, BLOCKS)
