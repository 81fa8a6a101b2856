"""Selection policies: which key blocks does each query block see?

A policy turns the block means of a chunk into `BlockLists`; one block-sparse attention kernel runs them all.
`DensePolicy` and `WindowPolicy` look at geometry only: they read `frame_slots` on the host, once per chunk.
`HSAPolicy` and `TopKPolicy` look at the data and stay on the device: one CUDA graph serves every chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from plugins.errors import PluginError
from plugins.kernels.specs import MAX_FRAMES, KernelProblem

from .launch import BlockLists, TorchKernels

__all__ = [
    "ChunkInputs",
    "DensePolicy",
    "HSAPolicy",
    "SelectionPolicy",
    "TopKPolicy",
    "WindowPolicy",
    "lists_from_mask",
    "mask_from_lists",
]


@dataclass(frozen=True)
class ChunkInputs:
    """What a policy may look at: the operator's inputs and geometry, without queries, keys and values.

    Attributes:
        q_mean, k_mean: float32 `[frames, blocks, H, D]` block means of the current chunk.
        past_kmean: float32 `[slots, k_blocks, H, D]`.
        frame_slots: int32 `[F]`, slot of each past frame, oldest first, then -1.
        chunk: int32 scalar.
        frame_tokens, block_q, block_k: tokens of a frame, a query block and a key block.
    """

    q_mean: Tensor
    k_mean: Tensor
    past_kmean: Tensor
    frame_slots: Tensor
    chunk: Tensor
    frame_tokens: int
    block_q: int
    block_k: int

    @property
    def problem(self) -> KernelProblem:
        """The sizes, as the kernels take them."""
        frames, _, heads, head_dim = self.q_mean.shape
        return KernelProblem(
            "bfloat16",
            heads,
            head_dim,
            self.frame_tokens,
            frames,
            self.frame_slots.numel(),
            self.block_q,
            self.block_k,
        )

    def present(self) -> int:
        """Number of past frames that are there. Waits for the device."""
        return int((self.frame_slots >= 0).sum())


class SelectionPolicy(Protocol):
    """Chooses the key blocks of every (head, query block)."""

    @property
    def name(self) -> str:
        """Short name, for tables."""
        ...

    def select(self, chunk: ChunkInputs) -> BlockLists:
        """The blocks that each query block sees; at least one, ascending."""
        ...


def _static_lists(chunk: ChunkInputs, index: Tensor) -> BlockLists:
    """Lists that are the same for every head: logical block indices, ascending, `[query_blocks, kept]`."""
    sizes = chunk.problem.sizes()
    packed = (index // sizes["k_blocks"] << 16) | index % sizes["k_blocks"]
    shape = (chunk.problem.heads, sizes["query_blocks"])
    entries = torch.zeros(*shape, sizes["key_blocks"], dtype=torch.int32)
    entries[..., : index.shape[1]] = packed.to(torch.int32)
    counts = torch.full(shape, index.shape[1], dtype=torch.int32)
    return BlockLists(entries.to(chunk.q_mean.device), counts.to(chunk.q_mean.device))


def _kept(chunk: ChunkInputs, keep_q20: Sequence[int], past: int) -> int:
    """The operator's number of kept blocks: integer arithmetic, chunk index clamped to the table."""
    total = (past + chunk.problem.chunk_frames) * chunk.problem.sizes()["k_blocks"]
    if past == 0:
        return total
    entry = keep_q20[min(max(int(chunk.chunk), 0), len(keep_q20) - 1)]
    return min(max(1, entry * total >> 20), total)


@dataclass(frozen=True)
class DensePolicy:
    """Every query block sees every resident key block."""

    name: str = "dense"

    def select(self, chunk: ChunkInputs) -> BlockLists:
        sizes = chunk.problem.sizes()
        total = (chunk.present() + chunk.problem.chunk_frames) * sizes["k_blocks"]
        return _static_lists(chunk, torch.arange(total).expand(sizes["query_blocks"], total))


@dataclass(frozen=True)
class WindowPolicy:
    """A window in time and space that slides with the query block, whatever the data: sliding-tile attention (STA).

    The window is a box around the query block, of the same proportions as all resident tokens, grown until it holds
    the number of blocks that the table keeps; its last ring is filled from the nearest block outwards. Space is the
    position in raster order.
    """

    keep_q20: tuple[int, ...]
    name: str = "window"

    def select(self, chunk: ChunkInputs) -> BlockLists:
        problem, past = chunk.problem, chunk.present()
        sizes = problem.sizes()
        frames = past + problem.chunk_frames
        query = torch.arange(sizes["query_blocks"])
        key = torch.arange(frames * sizes["k_blocks"])
        time = (past + query // sizes["q_blocks"])[:, None] - (key // sizes["k_blocks"])[None, :]
        query_centre = (2 * (query % sizes["q_blocks"]) + 1) * problem.block_q
        key_centre = (2 * (key % sizes["k_blocks"]) + 1) * problem.block_k
        space = query_centre[:, None] - key_centre[None, :]
        # Both in the same unit: the fraction of the resident tokens' extent, times 2 frames frame_tokens.
        time, space = time.abs() * 2 * problem.frame_tokens, space.abs() * frames
        ring = torch.maximum(time, space)
        order = ring * (4 * frames * problem.frame_tokens) + time + space
        nearest = order.sort(dim=1, stable=True).indices[:, : _kept(chunk, self.keep_q20, past)]
        return _static_lists(chunk, nearest.sort(dim=1).values)


@dataclass(frozen=True)
class HSAPolicy:
    """Hierarchical sparse attention: the best frames first, then the best blocks of those frames."""

    kernels: TorchKernels
    keep_frames: int
    sink_frames: int
    near_frames: int
    keep_q20: tuple[int, ...]
    name: str = "hsa"

    def select(self, chunk: ChunkInputs) -> BlockLists:
        return self.kernels.select(
            chunk.q_mean,
            chunk.k_mean,
            chunk.past_kmean,
            chunk.frame_slots,
            chunk.chunk,
            frame_tokens=chunk.frame_tokens,
            block_q=chunk.block_q,
            block_k=chunk.block_k,
            keep_frames=self.keep_frames,
            sink_frames=self.sink_frames,
            near_frames=self.near_frames,
            keep_q20=self.keep_q20,
        )


@dataclass(frozen=True)
class TopKPolicy:
    """One stage: the best blocks of all frames, as the sparse branch of SLA or SpargeAttn with a fixed budget."""

    kernels: TorchKernels
    keep_q20: tuple[int, ...]
    name: str = "top-k"

    def select(self, chunk: ChunkInputs) -> BlockLists:
        # With no more past frames than are kept, every frame is eligible.
        return HSAPolicy(self.kernels, MAX_FRAMES, 0, 0, self.keep_q20).select(chunk)


def lists_from_mask(mask: Tensor, k_blocks: int, key_blocks: int) -> BlockLists:
    """Lists of a bool mask `[H, query_blocks, resident key blocks]`; rows have room for `key_blocks` entries.

    Raises:
        PluginError: the mask has more columns than that.
    """
    if mask.shape[2] > key_blocks:
        raise PluginError(f"the mask has {mask.shape[2]} key blocks, the lists have room for {key_blocks}")
    order = (~mask).to(torch.int8).sort(dim=2, stable=True).indices
    entries = torch.zeros(*mask.shape[:2], key_blocks, dtype=torch.int32, device=mask.device)
    entries[..., : mask.shape[2]] = ((order // k_blocks << 16) | order % k_blocks).to(torch.int32)
    return BlockLists(entries, mask.sum(2).to(torch.int32))


def mask_from_lists(lists: BlockLists, k_blocks: int, resident: int) -> Tensor:
    """The bool mask `[H, query_blocks, resident]` of lists; `resident` is the number of resident key blocks."""
    entries = lists.entries.long()
    valid = torch.arange(entries.shape[2], device=entries.device) < lists.counts[..., None]
    index = (entries >> 16) * k_blocks + (entries & 0xFFFF)
    mask = torch.zeros(*entries.shape[:2], resident + 1, dtype=torch.bool, device=entries.device)
    return mask.scatter_(2, torch.where(valid, index, resident), True)[..., :resident]
