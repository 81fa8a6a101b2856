"""The other methods' operators on PyTorch tensors: their selection kernels or tables, then *attend*."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from plugins import contract, maps, operators
from plugins.contract import (
    AttentionAttributes,
    PersistentBlockAttributes,
    RadialAttributes,
    SlidingTileAttributes,
    SpargeAttributes,
    SparseLinearAttributes,
    VMoBAAttributes,
)
from plugins.errors import ContractError, PluginError
from plugins.kernels.specs import KernelProblem
from plugins.kernels.tuning import ORDERED_BLOCKS, QUERY_BLOCKS

from .launcher import BlockLists, Launcher, TritonLauncher, empty_lists

__all__ = ["OPERATORS", "MethodKernels"]

OPERATORS = (
    contract.SLIDING_TILE,
    contract.RADIAL,
    contract.SPARGE,
    contract.VMOBA,
    contract.PERSISTENT_BLOCK,
    contract.SPARSE_LINEAR,
)
"""Those that kernels execute, beside hierarchical sparse attention."""

_Tensors = Mapping[str, Tensor]


@cache
def _tables(
    attributes: AttentionAttributes, past: int, current: int, device: torch.device
) -> dict[str, Tensor]:
    if isinstance(attributes, SlidingTileAttributes):
        tables = maps.sliding_tile_tables(attributes, past, current, QUERY_BLOCKS, ORDERED_BLOCKS)
    elif isinstance(attributes, RadialAttributes):
        tables = maps.radial_tables(attributes, past, current)
    elif isinstance(attributes, VMoBAAttributes):
        tables = maps.vmoba_tables(attributes, past, current, ORDERED_BLOCKS)
    else:
        return {}
    return {name: torch.from_numpy(array).contiguous().to(device) for name, array in tables.arrays.items()}


@dataclass(frozen=True)
class MethodKernels:
    """Operators by name, called as their oracles are."""

    launcher: Launcher

    @classmethod
    def just_in_time(cls) -> MethodKernels:
        """With kernels that Triton compiles, or interprets."""
        return cls(TritonLauncher())

    def __call__(self, operator: str, *tensors: Tensor, **attributes: Any) -> Tensor:
        """The operator's output `[T, H, D]`.

        Raises:
            ContractError: an attribute lies outside its range, or there is no such operator.
        """
        if operator not in OPERATORS:
            raise ContractError(f"no kernels execute {operator!r}; expected one of {', '.join(OPERATORS)}")
        names = operators.OPERATORS[operator].inputs
        given = dict(zip(names, (tensor.contiguous() for tensor in tensors), strict=True))
        made = contract.ATTENTION_OPERATORS[operator](**attributes)
        if isinstance(made, VMoBAAttributes) and not made.query_block:
            raise PluginError(
                "the kernels of VMoBA choose for blocks of queries; give it a query_block above 0"
            )
        problem, tables = self._problem(made, given)
        lists = self.select(made, given)
        out = torch.empty_like(given["q"])
        buffers = {**given, **tables, "out": out, "lists": lists.entries, "counts": lists.counts}
        kernel = "attend" if problem.ordered_blocks is None else "attend_ordered"
        self.launcher.launch(kernel, problem, buffers, {"scale": made.scale})
        if isinstance(made, SparseLinearAttributes):
            self._add_linear(problem, buffers)
        return out

    def select(self, attributes: AttentionAttributes, given: _Tensors) -> BlockLists:
        """The blocks that each query block sees, in the order of tokens that the method has."""
        problem, tables = self._problem(attributes, given)
        device = given["q"].device
        lists = empty_lists(problem, device)
        buffers = {**given, **tables, "lists": lists.entries, "counts": lists.counts}
        if isinstance(attributes, SpargeAttributes):
            self._sparge(attributes, problem, buffers)
            return lists
        if isinstance(attributes, PersistentBlockAttributes):
            buffers["scores"] = torch.empty(lists.entries.shape, device=device)
            buffers["keep_q20"] = torch.tensor(attributes.keep_q20, dtype=torch.int32, device=device)
            self.launcher.launch("score", problem, buffers)
            options = {"table_entries": len(attributes.keep_q20)}
            self.launcher.launch("select_pinned", problem, buffers, options)
            return lists
        if isinstance(attributes, SparseLinearAttributes):
            self._rank(attributes, problem, buffers)
            return lists
        if isinstance(attributes, VMoBAAttributes):
            self._choose(attributes, problem, buffers)
        _, heads, _, _ = tables["frame_map"].shape
        _, rows, columns = buffers["block_map"].shape
        options = {"map_heads": heads, "map_rows": rows, "map_columns": columns}
        self.launcher.launch("expand", problem, buffers, options)
        return lists

    def _sparge(
        self, attributes: SpargeAttributes, problem: KernelProblem, buffers: dict[str, Tensor]
    ) -> None:
        q, entries = buffers["q"], buffers["lists"]
        heads, rows, columns = entries.shape
        buffers["scores"] = torch.empty(entries.shape, device=q.device)
        buffers["shift"] = torch.empty(heads, q.shape[2], device=q.device)
        buffers["unlike_q"] = torch.zeros(heads, rows, dtype=torch.uint8, device=q.device)
        buffers["unlike_k"] = torch.zeros(heads, columns, dtype=torch.uint8, device=q.device)
        buffers["keep_q20"] = torch.tensor(attributes.keep_q20, dtype=torch.int32, device=q.device)
        self.launcher.launch("score", problem, buffers)
        if attributes.similarity >= 0:  # below, all tokens are alike
            self.launcher.launch("mean_key", problem, buffers)
            judged = {"similarity": attributes.similarity, "smooth": attributes.smooth}
            self.launcher.launch("resemble", problem, buffers, judged)
        options = {"table_entries": len(attributes.keep_q20), "cumulative": attributes.cumulative}
        self.launcher.launch("select_sparge", problem, buffers, options)

    def _rank(
        self, attributes: SparseLinearAttributes, problem: KernelProblem, buffers: dict[str, Tensor]
    ) -> None:
        device = buffers["q"].device
        buffers["scores"] = torch.empty(buffers["lists"].shape, device=device)
        buffers["keep_q20"] = torch.tensor(attributes.keep_q20, dtype=torch.int32, device=device)
        # All frames stay eligible: one stage.
        options = {"keep_frames": max(1, problem.past_frames), "sink_frames": 0, "near_frames": 0}
        options |= {"table_entries": len(attributes.keep_q20)}
        for kernel in ("score", "select"):
            self.launcher.launch(kernel, problem, buffers, options)

    def _add_linear(self, problem: KernelProblem, buffers: dict[str, Tensor]) -> None:
        q, (heads, dim) = buffers["q"], (problem.heads, problem.head_dim)
        frames = problem.past_frames + problem.chunk_frames
        buffers["frame_state"] = torch.empty(frames, heads, dim, dim, device=q.device)
        buffers["frame_features"] = torch.empty(frames, heads, dim, device=q.device)
        buffers["linear_state"] = torch.empty(heads, dim, dim, device=q.device)
        buffers["linear_features"] = torch.empty(heads, dim, device=q.device)
        for kernel in ("sum_linear", "project_linear", "add_linear"):
            self.launcher.launch(kernel, problem, buffers)

    def _choose(
        self, attributes: VMoBAAttributes, problem: KernelProblem, buffers: dict[str, Tensor]
    ) -> None:
        q, (heads, rows, _) = buffers["q"], buffers["lists"].shape
        patches = buffers["patch_blocks"].numel() - 1
        times = problem.groups // patches
        options = {
            "group_frames": attributes.extent[0] or problem.past_frames + problem.chunk_frames,
            "patches": patches,
            "top": attributes.top,
            "threshold": attributes.threshold,
        }
        buffers["q_pool"] = torch.empty(rows, *q.shape[1:], device=q.device)
        buffers["k_pool"] = torch.empty(problem.groups, *q.shape[1:], device=q.device)
        buffers["scores"] = torch.empty(heads, rows, problem.groups, device=q.device)
        buffers["block_map"] = torch.empty(times, heads * rows, patches, dtype=torch.uint8, device=q.device)
        for kernel in ("pool", "score_groups", "choose"):
            self.launcher.launch(kernel, problem, buffers, options)

    def _problem(
        self, attributes: AttentionAttributes, given: _Tensors
    ) -> tuple[KernelProblem, dict[str, Tensor]]:
        q, slots = given["q"], given["frame_slots"]
        past, current = slots.numel(), q.shape[0] // attributes.frame_tokens
        problem = KernelProblem(
            str(q.dtype).removeprefix("torch."),
            q.shape[1],
            q.shape[2],
            attributes.frame_tokens,
            current,
            past,
            attributes.block_q,
            attributes.block_k,
        )
        tables = _tables(attributes, past, current, q.device)
        if "q_order" in tables:
            (q_blocks, block_q), (k_blocks, block_k) = tables["q_order"].shape, tables["k_order"].shape
            problem = replace(problem, block_q=block_q, block_k=block_k, ordered_blocks=(q_blocks, k_blocks))
        if "patch_blocks" in tables:
            groups = (int(tables["frame_map"].max()) + 1) * (tables["patch_blocks"].numel() - 1)
            problem = replace(problem, groups=groups)
        return problem, tables
