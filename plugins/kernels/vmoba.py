"""Block selection of VMoBA with queries pooled: means of blocks in time and space, and the ones that a run chooses."""

from __future__ import annotations

import triton
import triton.language as tl

from .select import count_present
from .sparge import crossing

__all__ = ["choose", "pool", "score_groups"]

_ABSENT = tl.constexpr(-(1 << 31))


@triton.jit(
    do_not_specialize=[
        "heads",
        "frame_tokens",
        "chunk_frames",
        "past_frames",
        "q_blocks",
        "block_q",
        "block_k",
        "groups",
        "group_frames",
        "patches",
    ]
)
def pool(
    q_pool,
    k_pool,
    q,
    k,
    past_k,
    frame_slots,
    q_order,
    k_order,
    patch_blocks,
    heads,
    frame_tokens,
    chunk_frames,
    past_frames,
    q_blocks,
    block_q,
    block_k,
    groups,
    group_frames,
    patches,
    HEAD_DIM: tl.constexpr,
    FRAMES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Mean keys of a group, a patch of up to `group_frames` frames, and mean queries of every so many-th query block.

    Grid (groups, heads). `q_pool` is float32 `[query_blocks, H, D]`, `k_pool` `[groups, H, D]`, zero where there is no
    such group; `patch_blocks` `[patches + 1]` says where the blocks of a patch begin in `k_order`.
    """
    group = tl.program_id(0)
    head = tl.program_id(1)
    present = count_present(frame_slots, past_frames, FRAMES)
    stride = heads * HEAD_DIM
    column = tl.arange(0, HEAD_DIM)

    patch = group % patches
    first_frame = (group // patches) * group_frames
    last_frame = tl.minimum(first_frame + group_frames, present + chunk_frames)
    begin = tl.load(patch_blocks + patch) * block_k
    end = tl.load(patch_blocks + patch + 1) * block_k
    total = tl.zeros([HEAD_DIM], tl.float32)
    count = tl.zeros([], tl.int32)
    for frame in tl.range(first_frame, last_frame):
        past = frame < present
        slot = tl.load(frame_slots + frame, mask=past, other=0)
        token = tl.where(past, slot, frame - present).to(tl.int64) * frame_tokens
        rows = tl.where(past, past_k, k) + token * stride + head * HEAD_DIM
        for first in tl.range(begin, end, TILE):
            at = first + tl.arange(0, TILE)
            place = tl.load(k_order + at, mask=at < end, other=-1)
            inside = place >= 0
            keys = tl.load(rows + place[:, None] * stride + column[None, :], mask=inside[:, None], other=0.0)
            total += tl.sum(keys.to(tl.float32), 0)
            count += tl.sum(inside.to(tl.int32), 0)
    mean = total / tl.maximum(count, 1).to(tl.float32)
    tl.store(k_pool + (group * heads + head).to(tl.int64) * HEAD_DIM + column, mean)

    for query_block in tl.range(group, chunk_frames * q_blocks, groups):
        begin = (query_block % q_blocks) * block_q
        rows = q + ((query_block // q_blocks) * frame_tokens).to(tl.int64) * stride + head * HEAD_DIM
        total = tl.zeros([HEAD_DIM], tl.float32)
        count = tl.zeros([], tl.int32)
        for first in tl.range(0, block_q, TILE):
            place = tl.load(q_order + begin + first + tl.arange(0, TILE))
            inside = place >= 0
            queries = tl.load(
                rows + place[:, None] * stride + column[None, :], mask=inside[:, None], other=0.0
            )
            total += tl.sum(queries.to(tl.float32), 0)
            count += tl.sum(inside.to(tl.int32), 0)
        mean = total / tl.maximum(count, 1).to(tl.float32)
        tl.store(q_pool + (query_block * heads + head).to(tl.int64) * HEAD_DIM + column, mean)


@triton.jit(do_not_specialize=["heads", "query_blocks", "groups"])
def score_groups(
    scores,
    q_pool,
    k_pool,
    heads,
    query_blocks,
    groups,
    HEAD_DIM: tl.constexpr,
    Q_TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    D_TILE: tl.constexpr,
):
    """scores[head, query block, group] = q_pool . k_pool: grid (group tiles, query tiles, heads)."""
    group = tl.program_id(0) * K_TILE + tl.arange(0, K_TILE)
    query = tl.program_id(1) * Q_TILE + tl.arange(0, Q_TILE)
    head = tl.program_id(2)
    stride = heads * HEAD_DIM
    queries = q_pool + query * stride + head * HEAD_DIM
    keys = k_pool + group.to(tl.int64) * stride + head * HEAD_DIM
    dim = tl.arange(0, D_TILE)
    result = tl.zeros([Q_TILE, K_TILE], tl.float32)
    for first in tl.range(0, HEAD_DIM, D_TILE):
        column = (first + dim)[None, :]
        a = tl.load(queries[:, None] + column, mask=(query < query_blocks)[:, None], other=0.0)
        b = tl.load(keys[:, None] + column, mask=(group < groups)[:, None], other=0.0)
        # As in `score`: three TF32 products carry the full float32 mantissa.
        result = tl.dot(a, tl.trans(b), result, input_precision="tf32x3")
    target = scores + (head * query_blocks + query).to(tl.int64)[:, None] * groups + group[None, :]
    tl.store(target, result, mask=(query < query_blocks)[:, None] & (group < groups)[None, :])


@triton.jit(
    do_not_specialize=["chunk_frames", "past_frames", "q_blocks", "groups", "group_frames", "patches", "top"]
)
def choose(
    block_map,
    scores,
    frame_slots,
    q_patches,
    chunk_frames,
    past_frames,
    q_blocks,
    groups,
    group_frames,
    patches,
    top,
    threshold,
    FRAMES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """The groups that one (query block, head) keeps, as *expand* reads them: grid (query_blocks, heads).

    `scores` is float32 `[H, query_blocks, groups]`, `block_map` uint8 `[times, H * query_blocks, patches]`, and
    `q_patches` int32 `[q_blocks, 2]` the first and the last patch of a block's tokens. `top` 0 goes by `threshold`.
    """
    row = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    rows = (tl.num_programs(1) * tl.num_programs(0)).to(tl.int64)
    present = count_present(frame_slots, past_frames, FRAMES)
    frames = present + chunk_frames
    group = tl.arange(0, GROUPS)
    time = group // patches
    patch = group % patches
    exists = time * group_frames < frames
    own_time = (present + tl.program_id(0) // q_blocks) // group_frames
    low_patch = tl.load(q_patches + (tl.program_id(0) % q_blocks) * 2)
    high_patch = tl.load(q_patches + (tl.program_id(0) % q_blocks) * 2 + 1)
    own = exists & (time == own_time) & (patch >= low_patch) & (patch <= high_patch)
    score = tl.load(scores + row * groups + group, mask=exists & (group < groups), other=0.0)

    low = tl.min(tl.where(exists, score, float("inf")), 0)
    high = tl.max(tl.where(exists, score, float("-inf")), 0)
    stretched = (score - low) / tl.where(high > low, high - low, 1.0)
    share = tl.where(exists, tl.where(high > low, stretched, 1.0), 0.0)  # equal scores share alike

    by_number = top > 0
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    ordered = tl.maximum(bits ^ ((bits >> 31) & 0x7FFFFFFF), _ABSENT + 1)
    key = tl.where(by_number, ordered, share.to(tl.int32, bitcast=True))
    others = exists & (own == 0)
    key = tl.where(others, key, _ABSENT)
    mass = tl.where(by_number, 1.0, share)
    owned = tl.sum(tl.where(own, mass, 0.0), 0)
    free = tl.where(others, mass, 0.0)
    limit = tl.where(by_number, top.to(tl.float32), threshold * (owned + tl.sum(free, 0))) - owned
    crossed = crossing(key, free, limit, True)
    before = tl.sum(tl.where(key > crossed, free, 0.0), 0)
    tie = (key == crossed) & others
    each = tl.max(tl.where(tie, free, 0.0), 0)
    earlier = tl.cumsum(tie.to(tl.int32), 0) - tie.to(tl.int32)
    better = others & ((key > crossed) | (tie & (before + earlier.to(tl.float32) * each < limit)))
    kept = own | better | (present == 0)
    tl.store(block_map + (time * rows + row) * patches + patch, kept.to(tl.uint8), mask=group < groups)
