"""Selection that follows from geometry alone, as tables: what a build, a plan and a kernel need of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .contract import RadialAttributes, SlidingTileAttributes, VMoBAAttributes

__all__ = [
    "Tables",
    "radial_blocks",
    "radial_share",
    "radial_tables",
    "sliding_tile_share",
    "sliding_tile_tables",
    "token_order",
    "vmoba_tables",
]

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


@lru_cache(maxsize=256)  # a plan asks for every forward of every chunk
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


@dataclass(frozen=True)
class Tables:
    """What kernels read of a selection that follows from geometry.

    Attributes:
        arrays: by the names of the kernels' buffers (docs/kernels.md).
    """

    arrays: Mapping[str, NDArray[np.int32] | NDArray[np.uint8]]

    @property
    def blocks(self) -> tuple[int, int] | None:
        """Query and key blocks of a frame that have the tokens which `q_order` and `k_order` name; None: blocks are
        runs of consecutive tokens.
        """
        if "q_order" not in self.arrays:
            return None
        return self.arrays["q_order"].shape[0], self.arrays["k_order"].shape[0]

    @property
    def groups(self) -> int:
        """Blocks in time and space among which queries choose, all that there can be; 0 where there are none."""
        if "patch_blocks" not in self.arrays:
            return 0
        return (int(self.arrays["frame_map"].max()) + 1) * (len(self.arrays["patch_blocks"]) - 1)


def token_order(part: NDArray[np.int_], size: int) -> NDArray[np.int32]:
    """A frame's tokens part by part, cut into blocks that hold tokens of one part only.

    Args:
        part: part of each token of a frame, from 0.
        size: most tokens of a block.

    Returns:
        int32 `[blocks, size]`, the tokens of each block in their order, then -1.
    """
    rows = []
    for index in range(int(part.max()) + 1):
        tokens = np.flatnonzero(part == index)
        rows += [tokens[first : first + size] for first in range(0, len(tokens), size)]
    order = np.full((len(rows), size), -1, dtype=np.int32)
    for row, tokens in zip(order, rows, strict=True):
        row[: len(tokens)] = tokens
    return order


def _roomy(part: NDArray[np.int_], sizes: Sequence[int], spare: float) -> NDArray[np.int32]:
    """The order with the largest blocks of which at most the share `spare` is empty; else the one that is fullest."""
    orders = [token_order(part, size) for size in sorted(sizes, reverse=True)]
    empty = [float((order < 0).mean()) for order in orders]
    return next(
        (o for o, share in zip(orders, empty, strict=True) if share <= spare), orders[int(np.argmin(empty))]
    )


def radial_tables(attributes: RadialAttributes, past: int, current: int) -> Tables:
    """Radial attention with up to `past` frames before the chunk's `current` ones, as *expand* reads it."""
    frames = past + current
    table = radial_blocks(
        attributes.frame_tokens, attributes.block_q, attributes.block_k, attributes.decay, frames
    )
    maps, of_distance = np.unique(table, axis=0, return_inverse=True)
    block_map, of_map = _whole_first(maps)
    frame_map = np.full((past + 1, 1, current, frames), -1, dtype=np.int32)
    for present in range(past + 1):
        resident = present + current
        frame = np.arange(resident)
        distance = np.abs(present + np.arange(current)[:, None] - frame)
        seen = of_map[of_distance.reshape(-1)[distance]]
        whole = (frame < attributes.sink_frames) | (present == 0)
        frame_map[present, 0, :, :resident] = np.where(whole, 0, seen)
    columns = np.arange(attributes.k_blocks, dtype=np.int32)
    return Tables({"frame_map": frame_map, "block_map": block_map, "columns": columns})


def sliding_tile_tables(
    attributes: SlidingTileAttributes, past: int, current: int, q_sizes: Sequence[int], k_sizes: Sequence[int]
) -> Tables:
    """Sliding tiles as *expand* and *attend* over orders read them: no block of tokens spans two tiles.

    Args:
        past, current: most frames before the chunk, and frames of the chunk.
        q_sizes, k_sizes: tokens that a query and a key block may have.
    """
    rows, columns = attributes.frame_tokens // attributes.columns, attributes.columns
    down, across = (-(-extent // tile) for extent, tile in zip((rows, columns), attributes.tile, strict=True))
    token = np.arange(attributes.frame_tokens)
    tile = token // columns // attributes.tile[0] * across + token % columns // attributes.tile[1]
    # Query tiles that are not full cost products, key tiles hardly anything: a step takes the next ones along.
    q_order, k_order = _roomy(tile, q_sizes, 1 / 5), _roomy(tile, k_sizes, 1 / 9)
    windows = list(zip(*(iter(attributes.windows),) * 3, strict=True))
    in_space = np.stack(
        [
            (
                _window(down, 1, height)[:, None, :, None] & _window(across, 1, width)[None, :, None, :]
            ).reshape(down * across, down * across)
            for _, height, width in windows
        ]
    )
    maps, of_window = np.unique(in_space, axis=0, return_inverse=True)
    block_map, of_map = _whole_first(maps)
    spatial = of_map[of_window.reshape(-1)]
    frames = past + current
    frame_map = np.full((past + 1, len(windows), current, frames), -1, dtype=np.int32)
    for present in range(past + 1):
        resident = present + current
        for head, (time, _, _) in enumerate(windows):
            in_time = _window(resident, 1, time)[present:]
            seen = np.where(in_time, spatial[head], -1)
            whole = (np.arange(resident) < attributes.sink_frames) | (present == 0)
            frame_map[present, head, :, :resident] = np.where(whole, 0, seen)
    return Tables(
        {
            "frame_map": frame_map,
            "block_map": block_map[:, tile[q_order[:, 0]]],
            "columns": tile[k_order[:, 0]].astype(np.int32),
            "q_order": q_order,
            "k_order": k_order,
        }
    )


def vmoba_tables(attributes: VMoBAAttributes, past: int, current: int, k_sizes: Sequence[int]) -> Tables:
    """Blocks in time and space for queries that choose together, as *pool*, *choose*, *expand* and *attend* read them.

    A key block holds tokens of one patch; a query block the next `query_block` tokens, patch by patch.

    Args:
        past, current: most frames before the chunk, and frames of the chunk.
        k_sizes: tokens that a key block may have.
    """
    rows, columns = attributes.frame_tokens // attributes.columns, attributes.columns
    time, tall, wide = attributes.extent
    tall, wide = tall or rows, wide or columns
    token = np.arange(attributes.frame_tokens)
    patch = token // columns // tall * -(-columns // wide) + token % columns // wide
    k_order = _roomy(patch, k_sizes, 1 / 9)
    blocks_of = patch[k_order[:, 0]]
    by_patch = np.argsort(patch, kind="stable")
    size = attributes.query_block
    q_order = np.full((-(-len(token) // size), size), -1, dtype=np.int32)
    q_order.reshape(-1)[: len(token)] = by_patch
    ends = [patch[row[row >= 0][[0, -1]]] for row in q_order]
    frames = past + current
    frame_map = np.full((past + 1, 1, current, frames), -1, dtype=np.int32)
    for present in range(past + 1):
        resident = present + current
        frame_map[present, :, :, :resident] = np.arange(resident) // (time or frames)
    return Tables(
        {
            "frame_map": frame_map,
            "columns": blocks_of.astype(np.int32),
            "q_order": q_order,
            "k_order": k_order,
            "q_patches": np.array(ends, dtype=np.int32),
            "patch_blocks": np.searchsorted(blocks_of, np.arange(int(patch.max()) + 2)).astype(np.int32),
        }
    )


def _whole_first(maps: NDArray[np.bool_]) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Maps behind one that shows everything, uint8 `[1 + maps, queries, keys]`, and where each of them went."""
    block_map = np.concatenate((np.ones_like(maps[:1]), maps)).astype(np.uint8)
    return block_map, 1 + np.arange(len(maps), dtype=np.int32)
