"""Selection that follows from geometry alone, as tables: what a build, a plan and a kernel need of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .contract import RadialAttributes, SlidingTileAttributes

__all__ = ["radial_blocks", "radial_share", "sliding_tile_share"]

_DENSE_COLUMN, _DENSE_COLUMNS = 1 / 3, 0.6
"""Radial attention keeps a block if more than 60 % of the columns with anything in them are filled to more than a
third."""


def _width(distance: int, frame_tokens: int, block: int, decay: float) -> float:
    """Half the width of the band between two frames, in tokens; below 0: none."""
    span = 2.0 ** (frame_tokens.bit_length() - distance.bit_length())
    if span < block and distance % max(1, int(block / span)):
        return -1.0
    return max(span * decay, float(block))


def radial_blocks(
    frame_tokens: int, block_q: int, block_k: int, decay: float, frames: int
) -> NDArray[np.bool_]:
    """Which blocks two frames see of each other at every distance below `frames`.

    Returns:
        bool `[frames, query blocks, key blocks]` of one frame each; see docs/policies.md for the rule.
    """
    blocks = [
        [np.arange(start, min(start + block, frame_tokens)) for start in range(0, frame_tokens, block)]
        for block in (block_q, block_k)
    ]
    table = np.ones((frames, *map(len, blocks)), dtype=np.bool_)
    known: dict[float, NDArray[np.bool_]] = {}
    for distance in range(2, frames):
        width = _width(distance, frame_tokens, block_k, decay)
        if width not in known:
            known[width] = np.array([[_dense(q, k, width) for k in blocks[1]] for q in blocks[0]])
        table[distance] = known[width]
    return table


def _dense(queries: NDArray[np.int_], keys: NDArray[np.int_], width: float) -> bool:
    filled = (np.abs(queries[:, None] - keys[None]) <= width).mean(0)
    return bool((filled > _DENSE_COLUMN).sum() > _DENSE_COLUMNS * (filled > 0).sum())


def radial_share(attributes: RadialAttributes, past: int, current: int) -> float:
    """Mean share of the resident keys that a query sees, with `past` frames before the chunk's `current` ones."""
    tokens, frames = attributes.frame_tokens, past + current
    table = radial_blocks(tokens, attributes.block_q, attributes.block_k, attributes.decay, frames)
    rows, columns = (
        np.minimum(block, tokens - np.arange(0, tokens, block))
        for block in (attributes.block_q, attributes.block_k)
    )
    by_distance = (table * rows[:, None] * columns).sum((1, 2)) / tokens**2
    distance = np.abs(past + np.arange(current)[:, None] - np.arange(frames))
    seen = np.where(np.arange(frames) < attributes.sink_frames, 1.0, by_distance[distance])
    return float(seen.mean())


def sliding_tile_share(attributes: SlidingTileAttributes, past: int, current: int) -> float:
    """Mean share of the resident keys that a query sees, over heads; arguments as in `radial_share`."""
    rows, columns = attributes.frame_tokens // attributes.columns, attributes.columns
    frames, (tall, wide) = past + current, attributes.tile
    sinks = min(attributes.sink_frames, frames)
    shares = []
    for time, height, width in zip(*(iter(attributes.windows),) * 3, strict=True):
        in_time = _window(frames, 1, time)[past:, sinks:].sum(1).mean() / frames
        in_space = _window(rows, tall, height).mean() * _window(columns, wide, width).mean()
        shares.append(sinks / frames + in_time * in_space)
    return float(np.mean(shares))


def _window(extent: int, tile: int, window: int) -> NDArray[np.bool_]:
    """Which places of an axis see which others, `[extent, extent]`, with tiles of `tile` places."""
    index, count = np.arange(extent) // tile, -(-extent // tile)
    if window >= count:
        return np.ones((extent, extent), dtype=np.bool_)
    reach = window // 2
    seen: NDArray[np.bool_] = np.abs(index.clip(reach, count - 1 - reach)[:, None] - index) <= reach
    return seen
