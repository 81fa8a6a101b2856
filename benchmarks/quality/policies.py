"""Selection policies of the quality benchmark, and what each of them sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightforcing_ref.attention import dense_attention, hsa_attention, hsa_selection
from lightforcing_ref.config import CHUNK_FRAMES, Preset
from lightforcing_ref.policies import (
    SLA,
    PersistentBlocks,
    PolicyAttention,
    Radial,
    SlidingTile,
    SpargeAttention,
    VMoBA,
)
from lightforcing_ref.policies import Policy as Method
from lightforcing_ref.sparsity import HSAConfig, SparsityTable, kept_blocks

__all__ = ["METHODS", "POLICIES", "Operator", "Policy"]

Selection = Callable[..., Tensor]
"""(q_mean, k_mean, past_frames, chunk, hsa, keep_q20) -> bool `[H, query blocks, key blocks]`."""

SPARSITY_TARGET, SPARSITY_BASE = 0.88, 0.98
"""Light Forcing's short configuration."""
MILD_TARGET, MILD_BASE = 0.80, 0.90
"""Its milder one, for larger blocks; a block of 32 tokens is half a frame here."""
TABLE_FRAMES = 21
EVERY_FRAME = 1 << 20
"""As `keep_frames`: more than there ever are, so that selection has one stage."""


@dataclass
class Operator:
    """An attention operator that counts what it sees.

    Args:
        call: as `hsa_attention`.
        visible: arguments as for `call` without `scale`; which keys are seen, bool, its last axis the keys or, as all
            of them have one size here, their blocks.
    """

    call: Callable[..., Tensor]
    visible: Callable[..., Tensor]
    counting: bool = False
    shares: list[float] = field(default_factory=list)
    """Of the keys of all frames so far, mean over heads and queries, of every call after the first chunk while
    `counting`."""

    def __call__(self, *tensors: Any, scale: float, **attributes: Any) -> Tensor:
        past, chunk = tensors[8].numel(), int(tensors[9])
        if self.counting and past:
            current = tensors[0].shape[0] // attributes["frame_tokens"]
            resident = (past + current) / (current * (chunk + 1))
            self.shares.append(resident * float(self.visible(*tensors, **attributes).float().mean()))
        return self.call(*tensors, scale=scale, **attributes)


@dataclass(frozen=True)
class Policy:
    """Which key blocks a query block sees.

    `cag`: whether the budget grows with the history as in Light Forcing; else every chunk after the first has the
    same sparsity, with the same average over all key-value work.
    """

    name: str
    selection: Selection | None
    """None: Light Forcing's own operator."""
    hsa: HSAConfig
    sparsity: float | None
    cag: bool = True
    base: float = SPARSITY_BASE
    """With CAG, the sparsity in the limit of a long history."""
    methods: tuple[Method, ...] = ()
    """Another method of the field in its place; where there are several, layers take them in turn."""
    window: int | None = None
    """Frames within which attention looks, as the method has it; None = all."""
    persistent: int = 0
    """Frames of the window that a persistent set fills."""
    keep: float | None = None
    """The fraction of the blocks that are not persistent to keep, in place of a sparsity."""

    def attend(self, preset: Preset) -> list[Operator]:
        """The attention operator of every layer."""
        made = []
        for layer in range(preset.dit.layers):
            if self.methods:
                method = PolicyAttention(self.methods[layer % len(self.methods)], preset.token_grid())
                made.append(Operator(method, method.visible))
            elif self.selection is None:
                made.append(Operator(hsa_attention, _selected_by(_hierarchical)))
            else:
                made.append(Operator(_attend_with(self.selection), _selected_by(self.selection)))
        return made

    def keep_q20(self, preset: Preset) -> tuple[int, ...]:
        """The kept fraction of every chunk, in fixed point."""
        totals = [
            preset.geometry().k_blocks * frames
            for frames in range(CHUNK_FRAMES, TABLE_FRAMES + 1, CHUNK_FRAMES)
        ]
        if self.keep is not None:
            return SparsityTable((1 - self.keep,)).keep_q20(totals)
        if self.sparsity is None:
            return SparsityTable.dense().keep_q20(totals)
        base = self.base if self.cag else self.sparsity
        return SparsityTable.chunk_aware(self.sparsity, base, table_frames=TABLE_FRAMES).keep_q20(totals)


def _hierarchical(
    q_mean: Tensor, k_mean: Tensor, past: int, chunk: int, hsa: HSAConfig, keep: Sequence[int]
) -> Tensor:
    """Light Forcing's selection."""
    return hsa_selection(q_mean, k_mean, past_frames=past, chunk=chunk, hsa=hsa, keep_q20=keep)


def _nearest(
    q_mean: Tensor, k_mean: Tensor, past: int, chunk: int, _: HSAConfig, keep: Sequence[int]
) -> Tensor:
    """The most recent blocks, whatever they hold: a sliding window."""
    total = k_mean.shape[0] * k_mean.shape[1]
    seen = torch.arange(total) >= total - kept_blocks(keep, chunk, total)
    return seen.expand(q_mean.shape[2], q_mean.shape[0] * q_mean.shape[1], total)


def _random(
    q_mean: Tensor, k_mean: Tensor, past: int, chunk: int, _: HSAConfig, keep: Sequence[int]
) -> Tensor:
    """Blocks drawn at random, the same ones for every head and query block: what a budget alone is worth."""
    total = k_mean.shape[0] * k_mean.shape[1]
    generator = torch.Generator().manual_seed(chunk)
    chosen = torch.randperm(total, generator=generator)[: kept_blocks(keep, chunk, total)]
    seen = torch.zeros(total, dtype=torch.bool).index_fill(0, chosen, True)
    return seen.expand(q_mean.shape[2], q_mean.shape[0] * q_mean.shape[1], total)


def _selected_by(selection: Selection) -> Callable[..., Tensor]:
    """What the selection keeps, as a function of the operator's arguments."""

    def selected(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_mean: Tensor,
        k_mean: Tensor,
        past_k: Tensor,
        past_v: Tensor,
        past_kmean: Tensor,
        frame_slots: Tensor,
        chunk: int,
        *,
        keep_frames: int,
        sink_frames: int,
        near_frames: int,
        keep_q20: Sequence[int],
        **_: object,
    ) -> Tensor:
        slots = frame_slots.long()
        means = torch.cat((past_kmean[slots], k_mean))
        hsa = HSAConfig(keep_frames, sink_frames, near_frames)
        return selection(q_mean, means, len(slots), int(chunk), hsa, keep_q20)

    return selected


def _attend_with(selection: Selection) -> Callable[..., Tensor]:
    """The attention operator with another policy in front."""
    selected_by = _selected_by(selection)

    def attend(*tensors: Tensor, scale: float, block_q: int, block_k: int, **attributes: Any) -> Tensor:
        q, k, v, _, _, past_k, past_v, _, frame_slots, _ = tensors
        slots = frame_slots.long()
        keys = torch.cat((past_k[slots].flatten(0, 1), k))
        values = torch.cat((past_v[slots].flatten(0, 1), v))
        if len(slots) == 0:
            return dense_attention(q, keys, values, scale)
        selected = selected_by(*tensors, **attributes)
        mask = selected.repeat_interleave(block_q, 1).repeat_interleave(block_k, 2)
        return dense_attention(q, keys, values, scale, mask)

    return attend


_VMOBA = (
    VMoBA((1, None, None), "top-k", 2),
    VMoBA((None, 2, 4), "top-k", 1),
    VMoBA((2, 4, 4), "top-k", 3),
)
"""Blocks in time, in space, and in both, for the 8 x 8 tokens of the tiny model's frames."""
_HSA = HSAConfig()
_ONE_STAGE = HSAConfig(keep_frames=EVERY_FRAME, sink_frames=0, near_frames=0)
POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy("dense", None, _HSA, None),
        Policy("hsa", None, _HSA, SPARSITY_TARGET),
        Policy("hsa-80", None, _HSA, MILD_TARGET, base=MILD_BASE),
        Policy("hsa-uniform", None, _HSA, SPARSITY_TARGET, cag=False),
        Policy("top-k", None, _ONE_STAGE, SPARSITY_TARGET),
        Policy("top-k-uniform", None, _ONE_STAGE, SPARSITY_TARGET, cag=False),
        Policy("nearest", _nearest, _HSA, SPARSITY_TARGET),
        Policy("nearest-uniform", _nearest, _HSA, SPARSITY_TARGET, cag=False),
        Policy("random", _random, _HSA, SPARSITY_TARGET),
        Policy("sla", None, _HSA, SPARSITY_TARGET, methods=(SLA(),)),
        Policy("sparge", None, _HSA, SPARSITY_TARGET, methods=(SpargeAttention(),)),
        Policy("sta", None, _HSA, None, methods=(SlidingTile(((1, 3, 3), (9, 1, 1)), tile=(4, 4)),)),
        Policy("sta-one", None, _HSA, None, methods=(SlidingTile(((7, 1, 1),), tile=(4, 4)),)),
        Policy("vmoba", None, _HSA, None, methods=_VMOBA),
        Policy("vmoba-threshold", None, _HSA, None, methods=tuple(VMoBA(m.block) for m in _VMOBA)),
        Policy("pbsa", None, _HSA, None, methods=(PersistentBlocks(),), window=7, persistent=1, keep=0.2),
        Policy("radial", None, _HSA, None, methods=(Radial(),)),
    )
}
"""By name. From `hsa` to `sparge`, all but `hsa-80` have the same table, `-uniform` without CAG (`sparge` adds blocks
that their means do not stand for). The windows of `sta`, one for each of two heads, and of `sta-one`, the blocks of
`vmoba`, and window, set and fraction of `pbsa` are chosen for about the same share of the keys. `radial` and
`vmoba-threshold` have rules of their own. SLA without its linear branch is `top-k`."""
METHODS = ("hsa", "sla", "sparge", "sta", "vmoba", "pbsa", "radial", "nearest", "random")
"""What `--policies all` compares: the methods of the field, then what a budget is worth without a choice."""
