"""How much of the resident keys a method of selection lets a query see: exactly where geometry or a budget decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from export.request.methods import RANKED, method_attributes, operator_of
from lightforcing_ref.sparsity import BlockGeometry, kept_blocks
from plugins import contract, maps
from runtime.bundle import AttentionPolicy
from runtime.bundle.policies import PbsaPolicy, RadialPolicy, SpargePolicy, StaPolicy, VmobaPolicy

__all__ = ["Share", "own_share", "visible_blocks"]


@dataclass(frozen=True)
class Share:
    """A share of the resident keys.

    Attributes:
        assumption: what it rests on where the data decides; None = it is exact.
    """

    value: float
    assumption: str | None = None


def own_share(
    method: AttentionPolicy, geometry: BlockGeometry, grid: tuple[int, int], past: int, current: int
) -> Share | None:
    """What a query sees on average under a method with a rule of its own; None where a budget of blocks decides.

    Args:
        grid: rows and columns of a frame's tokens.
        past, current: resident frames before the chunk, and of the chunk.
    """
    if operator_of(method) in RANKED:
        return None
    if past == 0:
        return Share(1.0)
    common: dict[str, Any] = {
        "frame_tokens": geometry.frame_tokens,
        "block_q": geometry.block_q,
        "block_k": geometry.block_k,
        "scale": 1.0,
    }
    own = method_attributes(method, 0, grid[1])
    if isinstance(method, StaPolicy):
        tiles = contract.SlidingTileAttributes(**common, **own)
        return Share(maps.sliding_tile_share(tiles, past, current))
    if isinstance(method, RadialPolicy):
        return Share(maps.radial_share(contract.RadialAttributes(**common, **own), past, current))
    if isinstance(method, SpargePolicy):
        if method.mode == "top-k":
            return None
        return Share(method.cumulative, "all blocks weigh alike, the most that this threshold can keep")
    assert isinstance(method, VmobaPolicy)
    return _vmoba(method, grid, past + current)


def visible_blocks(
    method: AttentionPolicy,
    keep_q20: Sequence[int],
    chunk: int,
    blocks: int,
    sinks: int,
    past: int,
    current: int,
) -> int:
    """Key blocks that each query block of `chunk` sees where a budget decides.

    Args:
        blocks: of a frame.
        sinks: sink frames of the cache.
        past, current: resident frames before the chunk, and of the chunk.
    """
    pinned = 0
    if isinstance(method, PbsaPolicy):
        # Virtual frames come once the window is full.
        pinned = min(sinks, past) + max(0, past - sinks - (method.local_frames - current))
    total = (past + current) * blocks
    return total if past == 0 else pinned * blocks + kept_blocks(keep_q20, chunk, total - pinned * blocks)


def _vmoba(method: VmobaPolicy, grid: tuple[int, int], frames: int) -> Share:
    """The mean over the layers' turns."""
    if method.mode == "threshold":
        # Of scores that are spread evenly over 0..1 the best f hold 1 - (1 - f)^2 of the sum.
        return Share(1 - sqrt(1 - method.threshold), "a token's scores are spread evenly")
    shares = []
    for extent, top in zip(method.blocks, method.tops, strict=True):
        blocks = 1
        for size, all_of_it in zip(extent, (frames, *grid), strict=True):
            blocks *= -(-all_of_it // size) if size else 1
        shares.append(min(1.0, top / blocks))
    return Share(sum(shares) / len(shares), "blocks at the border are as large as the others")
