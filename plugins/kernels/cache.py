"""The two kernels that write frame slots: committing a chunk, and re-roping sink frames when the window slides."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["commit", "move", "rope_sink"]


@triton.jit
def move(target, source, slot, frame, size, element):
    """Copy those of the elements of a frame, `size` in all, into a slot."""
    inside = element < size
    moved = tl.load(source + frame.to(tl.int64) * size + element, mask=inside)
    tl.store(target + slot * size + element, moved, mask=inside)


@triton.jit(do_not_specialize=["heads", "frame_tokens", "k_blocks"])
def commit(
    past_k,
    past_v,
    past_kmean,
    k,
    v,
    k_mean,
    commit_slots,
    heads,
    frame_tokens,
    k_blocks,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
):
    """Copy each frame of the chunk into slot `commit_slots[frame]`, or nowhere if that is negative.

    Grid (tiles of a frame's elements, chunk_frames, 2): axis 2 is 0 for keys and their block means, 1 for values.
    k and v are moved as 16-bit integers, so one image serves every 16-bit type.
    """
    frame = tl.program_id(1)
    slot = tl.load(commit_slots + frame).to(tl.int64)
    if slot < 0:
        return
    width = heads * HEAD_DIM
    element = tl.program_id(0) * TILE + tl.arange(0, TILE)
    values = tl.program_id(2) == 1
    move(tl.where(values, past_v, past_k), tl.where(values, v, k), slot, frame, frame_tokens * width, element)
    if values:
        return
    # There are never more blocks than tokens, so the same tiles cover the block means.
    move(past_kmean, k_mean, slot, frame, k_blocks * width, element)


@triton.jit
def _turn(target, source, rows, row_limit, stride, c, s, HEAD_DIM: tl.constexpr):
    """Rotate the pairs of `source[rows]` (one head) by the angles whose cosine and sine are `c`, `s` `[HEAD_DIM/2]`."""
    column = tl.arange(0, HEAD_DIM)
    offset = rows[:, None] * stride + column[None, :]
    inside = (rows < row_limit)[:, None]
    x = tl.load(source + offset, mask=inside, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(x, [x.shape[0], HEAD_DIM // 2, 2]))
    turned = tl.join(even * c[None, :] - odd * s[None, :], even * s[None, :] + odd * c[None, :])
    tl.store(target + offset, tl.reshape(turned, x.shape).to(target.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["heads", "frame_tokens", "k_blocks", "turned_pairs"])
def rope_sink(
    past_k,
    past_kmean,
    sink_k,
    sink_kmean,
    sink_slots,
    cos,
    sin,
    heads,
    frame_tokens,
    k_blocks,
    turned_pairs,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write sink frames, rotated along time, into their slots: grid (token tiles, heads, sink frames).

    `sink_k`, `sink_kmean` hold the keys and block means as committed; `cos`, `sin` float32 `[sinks, turned_pairs]`
    the rotation from the committed to the new temporal position. The first `turned_pairs` pairs of each head turn,
    the others are copied.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1)
    sink = tl.program_id(2)
    slot = tl.load(sink_slots + sink).to(tl.int64)
    if slot < 0:
        return
    pair = tl.arange(0, HEAD_DIM // 2)
    c = tl.load(cos + sink * turned_pairs + pair, mask=pair < turned_pairs, other=1.0)
    s = tl.load(sin + sink * turned_pairs + pair, mask=pair < turned_pairs, other=0.0)
    stride = heads * HEAD_DIM
    offset = head * HEAD_DIM
    rows = tile * TILE + tl.arange(0, TILE)
    size = frame_tokens * stride
    _turn(past_k + slot * size + offset, sink_k + sink.to(tl.int64) * size + offset, rows, frame_tokens, stride, c, s,
          HEAD_DIM)  # fmt: skip
    means = k_blocks * stride
    # As above: the token tiles cover the block means.
    _turn(past_kmean + slot * means + offset, sink_kmean + sink.to(tl.int64) * means + offset, rows, k_blocks, stride,
          c, s, HEAD_DIM)  # fmt: skip
