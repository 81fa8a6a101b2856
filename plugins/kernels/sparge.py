"""Block selection of SpargeAttn: pooled weights up to a number or a share, and blocks that their means misrepresent."""

from __future__ import annotations

import triton
import triton.language as tl

from .select import BLOCK_BITS, count_present

__all__ = ["crossing", "mean_key", "resemble", "select_sparge"]

_ABSENT = tl.constexpr(-(1 << 31))
_ENTRY_BITS = tl.constexpr(BLOCK_BITS)


@triton.jit
def crossing(key, mass, limit, REACH: tl.constexpr):
    """The largest integer t such that what `mass` adds up to over keys of at least t exceeds `limit`.

    `REACH`: reaching it is enough. One bit at a time from the top; `_ABSENT` where everything together does not.
    """
    threshold = tl.full([], _ABSENT, tl.int32)
    for bit in tl.range(-1, 31):
        raised = tl.where(bit < 0, 0, threshold | (1 << tl.maximum(30 - bit, 0)))
        total = tl.sum(tl.where(key >= raised, mass, 0.0), 0)
        enough = total >= limit if REACH else total > limit
        threshold = tl.where(enough, raised, threshold)
    return threshold


@triton.jit(do_not_specialize=["heads", "frame_tokens", "chunk_frames", "past_frames", "k_blocks", "block_k"])
def mean_key(
    shift,
    k_mean,
    past_kmean,
    frame_slots,
    heads,
    frame_tokens,
    chunk_frames,
    past_frames,
    k_blocks,
    block_k,
    HEAD_DIM: tl.constexpr,
    FRAMES: tl.constexpr,
    TILE: tl.constexpr,
):
    """shift[head] = the mean of all resident keys, from the means of their blocks: grid (heads)."""
    head = tl.program_id(0)
    present = count_present(frame_slots, past_frames, FRAMES)
    frames = present + chunk_frames
    stride = heads * HEAD_DIM
    column = tl.arange(0, HEAD_DIM)
    total = tl.zeros([HEAD_DIM], tl.float32)
    for first in tl.range(0, frames * k_blocks, TILE):
        index = first + tl.arange(0, TILE)
        inside = index < frames * k_blocks
        frame = index // k_blocks
        block = index % k_blocks
        past = frame < present
        slot = tl.load(frame_slots + frame, mask=inside & past, other=0)
        row = tl.where(past, slot, frame - present) * k_blocks + block
        means = tl.where(past, past_kmean, k_mean) + row.to(tl.int64) * stride + head * HEAD_DIM
        tokens = tl.minimum(block_k, frame_tokens - block * block_k).to(tl.float32)
        value = tl.load(means[:, None] + column[None, :], mask=inside[:, None], other=0.0)
        total += tl.sum(value * tokens[:, None], 0)
    tl.store(shift + head * HEAD_DIM + column, total / (frames * frame_tokens).to(tl.float32))


@triton.jit
def _likeness(rows, tokens, stride, shift, HEAD_DIM: tl.constexpr, TILE: tl.constexpr):
    """The square of the mean unit vector of `tokens` rows, less `shift`: the mean cosine of all their pairs."""
    column = tl.arange(0, HEAD_DIM)
    total = tl.zeros([HEAD_DIM], tl.float32)
    for first in tl.range(0, tokens, TILE):
        row = first + tl.arange(0, TILE)
        inside = (row < tokens)[:, None]
        value = tl.load(rows + row[:, None] * stride + column[None, :], mask=inside, other=0.0)
        value = tl.where(inside, value.to(tl.float32) - shift[None, :], 0.0)
        length = tl.sqrt(tl.sum(value * value, 1))
        total += tl.sum(value / tl.maximum(length, 1e-12)[:, None], 0)
    return tl.sum(total * total) / (tokens * tokens).to(tl.float32)


@triton.jit(
    do_not_specialize=[
        "heads",
        "frame_tokens",
        "chunk_frames",
        "past_frames",
        "q_blocks",
        "k_blocks",
        "key_blocks",
        "block_q",
        "block_k",
        "smooth",
    ]
)
def resemble(
    unlike_q,
    unlike_k,
    q,
    k,
    past_k,
    shift,
    frame_slots,
    heads,
    frame_tokens,
    chunk_frames,
    past_frames,
    q_blocks,
    k_blocks,
    key_blocks,
    block_q,
    block_k,
    similarity,
    smooth,
    HEAD_DIM: tl.constexpr,
    FRAMES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Whether the tokens of a key block, and of every so many-th query block, are unlike: grid (key_blocks, heads).

    `unlike_q` is uint8 `[H, query_blocks]`, `unlike_k` `[H, key_blocks]` by logical key block.
    """
    index = tl.program_id(0)
    head = tl.program_id(1)
    present = count_present(frame_slots, past_frames, FRAMES)
    stride = heads * HEAD_DIM
    column = tl.arange(0, HEAD_DIM)
    mean = tl.load(shift + head * HEAD_DIM + column) * smooth

    frame = index // k_blocks
    if frame < present + chunk_frames:
        start = (index % k_blocks) * block_k
        past = frame < present
        slot = tl.load(frame_slots + frame, mask=past, other=0)
        token = tl.where(past, slot, frame - present).to(tl.int64) * frame_tokens + start
        rows = tl.where(past, past_k, k) + token * stride + head * HEAD_DIM
        likeness = _likeness(rows, tl.minimum(block_k, frame_tokens - start), stride, mean, HEAD_DIM, TILE)
        tl.store(unlike_k + head * key_blocks + index, ((likeness > similarity) == 0).to(tl.uint8))

    nothing = tl.zeros([HEAD_DIM], tl.float32)
    query_blocks = chunk_frames * q_blocks
    for query_block in tl.range(index, query_blocks, tl.num_programs(0)):
        start = (query_block % q_blocks) * block_q
        token = ((query_block // q_blocks) * frame_tokens + start).to(tl.int64)
        rows = q + token * stride + head * HEAD_DIM
        likeness = _likeness(rows, tl.minimum(block_q, frame_tokens - start), stride, nothing, HEAD_DIM, TILE)
        tl.store(unlike_q + head * query_blocks + query_block, ((likeness > similarity) == 0).to(tl.uint8))


@triton.jit(
    do_not_specialize=[
        "head_dim",
        "chunk_frames",
        "past_frames",
        "k_blocks",
        "key_blocks",
        "table_entries",
    ]
)
def select_sparge(
    lists,
    counts,
    scores,
    unlike_q,
    unlike_k,
    frame_slots,
    chunk,
    keep_q20,
    head_dim,
    chunk_frames,
    past_frames,
    k_blocks,
    key_blocks,
    table_entries,
    cumulative,
    FRAMES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The kept key blocks of one (query block, head), ascending, and how many: grid (query_blocks, heads).

    With `cumulative` above 0, the fewest blocks whose weights exceed it, else as many as the table says; and all whose
    tokens are unlike.
    """
    head = tl.program_id(1)
    row = (head * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    present = count_present(frame_slots, past_frames, FRAMES)
    frames = present + chunk_frames
    total = frames * k_blocks
    entry = tl.minimum(tl.maximum(tl.load(chunk), 0), table_entries - 1)
    keep = ((tl.load(keep_q20 + entry).to(tl.int64) * total) >> 20).to(tl.int32)
    keep = tl.minimum(tl.maximum(keep, 1), total)

    size: tl.constexpr = FRAMES * BLOCKS
    place = tl.arange(0, size)
    frame = place // BLOCKS
    block = place % BLOCKS
    exists = (frame < frames) & (block < k_blocks)
    index = frame * k_blocks + block
    alike = tl.load(unlike_k + head * key_blocks + index, mask=exists, other=0) == 0
    alone = tl.load(unlike_q + row) != 0
    value = tl.load(scores + row * key_blocks + index, mask=exists, other=0.0)

    # Subtracting the mean key moves every score of a row alike, which a softmax does not see.
    logits = tl.where(exists & alike, value / tl.sqrt(head_dim.to(tl.float32)), float("-inf"))
    top = tl.max(logits, 0)
    weights = tl.where(exists & alike, tl.exp(logits - top), 0.0)
    whole = tl.sum(weights, 0)
    weights = weights / tl.where(whole > 0, whole, 1.0)

    by_share = cumulative > 0
    key = tl.where(exists, weights.to(tl.int32, bitcast=True), _ABSENT)
    mass = tl.where(by_share, weights, exists.to(tl.float32))
    limit = tl.where(by_share, cumulative, (keep - 1).to(tl.float32))
    threshold = crossing(key, mass, limit, False)
    before = tl.sum(tl.where(key > threshold, mass, 0.0), 0)
    tie = (key == threshold) & exists
    each = tl.max(tl.where(tie, mass, 0.0), 0)
    earlier = tl.cumsum(tie.to(tl.int32), 0) - tie.to(tl.int32)
    chosen = (key > threshold) | (tie & (before + earlier.to(tl.float32) * each <= limit))
    kept = (exists & (chosen | (alike == 0) | alone | (present == 0))).to(tl.int32)

    position = tl.cumsum(kept, 0) - 1
    tl.store(lists + row * key_blocks + position, (frame << _ENTRY_BITS) | block, mask=kept != 0)
    tl.store(counts + row, tl.sum(kept, 0))
