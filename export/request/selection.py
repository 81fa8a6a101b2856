"""What the kernels of a method select by: its tables for every turn of layers. Light: memory plans read their sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightforcing_ref.sparsity import BlockGeometry
from plugins import contract, maps
from plugins.kernels.tuning import ORDERED_BLOCKS, QUERY_BLOCKS
from runtime.bundle import AttentionPolicy
from runtime.bundle.policies import RadialPolicy, SpargePolicy, StaPolicy, VmobaPolicy, has_linear_branch

from .methods import method_attributes

__all__ = ["selection_bytes", "selection_tables"]


def selection_tables(
    method: AttentionPolicy, geometry: BlockGeometry, columns: int, past: int, current: int
) -> Sequence[maps.Tables]:
    """The tables of each turn that layers take; none where a method selects by the data alone.

    Args:
        columns: tokens of a frame's row.
        past, current: most frames before the chunk, and frames of the chunk.
    """
    common: dict[str, Any] = {
        "frame_tokens": geometry.frame_tokens,
        "block_q": geometry.block_q,
        "block_k": geometry.block_k,
        "scale": 1.0,
    }
    given = {**common, **method_attributes(method, 0, columns)}
    if isinstance(method, StaPolicy):
        tiles = contract.SlidingTileAttributes(**given)
        return [maps.sliding_tile_tables(tiles, past, current, QUERY_BLOCKS, ORDERED_BLOCKS)]
    if isinstance(method, RadialPolicy):
        return [maps.radial_tables(contract.RadialAttributes(**given), past, current)]
    if isinstance(method, VmobaPolicy):
        pooled = method.model_copy(update={"gating": "pooled"})  # what kernels do
        turns = (method_attributes(pooled, turn, columns) for turn in range(len(method.blocks)))
        attributes = (contract.VMoBAAttributes(**common, **turn) for turn in turns)
        return [maps.vmoba_tables(made, past, current, ORDERED_BLOCKS) for made in attributes]
    return []


def selection_bytes(
    method: AttentionPolicy,
    geometry: BlockGeometry,
    columns: int,
    past: int,
    current: int,
    heads: int,
    head_dim: int,
) -> int:
    """Bytes of everything that the kernels of attention share; arguments as in `selection_tables`."""
    tables = selection_tables(method, geometry, columns, past, current)
    cuts = [turn.blocks or (geometry.q_blocks, geometry.k_blocks) for turn in tables]
    largest = 0
    for q_blocks, k_blocks in cuts or [(geometry.q_blocks, geometry.k_blocks)]:
        rows, key_blocks = heads * current * q_blocks, (past + current) * k_blocks
        lists = 4 * rows * (key_blocks + 1)
        if not tables:  # scores beside the lists
            lists += 4 * rows * key_blocks
        if isinstance(method, SpargePolicy) and not method.plain:
            lists += 4 * heads * head_dim + rows + heads * key_blocks
        largest = max(largest, lists)
    if has_linear_branch(method):
        # What each frame leaves, and all of them together; and the sums of features.
        largest += 4 * heads * head_dim * (head_dim + 1) * (past + current + 1)
    if isinstance(method, VmobaPolicy):
        largest += _group_bytes(tables, current, heads, head_dim)
    return largest + sum(array.nbytes for turn in tables for array in turn.arrays.values())


def _group_bytes(tables: Sequence[maps.Tables], current: int, heads: int, head_dim: int) -> int:
    """Bytes of pooled queries and keys, their scores and what was chosen; each as large as its largest turn."""
    largest = {"q_pool": 0, "k_pool": 0, "scores": 0}
    for turn in tables:
        rows = current * len(turn.arrays["q_order"])
        sizes = {
            "q_pool": 4 * rows * heads * head_dim,
            "k_pool": 4 * turn.groups * heads * head_dim,
            "scores": 5 * heads * rows * turn.groups,
        }
        largest = {name: max(largest[name], size) for name, size in sizes.items()}
    return sum(largest.values())
