# mypy: allow-untyped-calls, no-warn-return-any
"""Inputs of the attention benchmark: random ones for time, structured ones for quality."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from plugins.eager.policies import ChunkInputs
from plugins.kernels.specs import KernelProblem

__all__ = ["AttentionInputs", "FrameChoice", "Shape", "random_inputs", "video_inputs"]

CHUNK_FRAMES = 3


class FrameChoice(TypedDict):
    """How many frames hierarchical sparse attention keeps, and which of them in any case."""

    keep_frames: int
    sink_frames: int
    near_frames: int


@dataclass(frozen=True)
class Shape:
    """One attention call: `past` frames of history and the current chunk."""

    frame_tokens: int
    past: int
    block_q: int
    block_k: int
    heads: int = 12
    head_dim: int = 128

    @property
    def frames(self) -> int:
        return self.past + CHUNK_FRAMES

    @property
    def k_blocks(self) -> int:
        return -(-self.frame_tokens // self.block_k)

    @property
    def resident(self) -> int:
        """Resident key blocks."""
        return self.frames * self.k_blocks

    @property
    def problem(self) -> KernelProblem:
        """The call as the kernels' tables take it."""
        return KernelProblem(
            "bfloat16",
            self.heads,
            self.head_dim,
            self.frame_tokens,
            CHUNK_FRAMES,
            self.past,
            self.block_q,
            self.block_k,
        )

    def keep_q20(self, sparsity: float) -> tuple[int]:
        """A one-entry table that keeps `int((1 - sparsity) * resident)` blocks."""
        kept = max(1, int((1 - sparsity) * self.resident))
        return (-(-(kept << 20) // self.resident),)

    def dense_flops(self) -> float:
        """Operations of dense attention: two matrix products of 2 T K D each, per head."""
        tokens = CHUNK_FRAMES * self.frame_tokens
        return 4.0 * tokens * self.frames * self.frame_tokens * self.head_dim * self.heads


@dataclass(frozen=True)
class AttentionInputs:
    """Tensors of one call, as the operator takes them; `keys` and `values` hold the same sequence in logical order."""

    q: Tensor
    k: Tensor
    v: Tensor
    past_k: Tensor
    past_v: Tensor
    chunk: ChunkInputs
    keys: Tensor
    values: Tensor


def _block_means(x: Tensor, frame_tokens: int, block: int) -> Tensor:
    """float32 `[frames, blocks, H, D]`, each block averaged over its own rows."""
    frames = x.unflatten(0, (-1, frame_tokens)).float()
    return torch.stack([part.mean(1) for part in frames.split(block, dim=1)], dim=1)


def _assemble(q: Tensor, keys: Tensor, values: Tensor, shape: Shape, order: Tensor) -> AttentionInputs:
    past_tokens = shape.past * shape.frame_tokens
    slot_shape = (shape.past, shape.frame_tokens, shape.heads, shape.head_dim)
    inverse = order.argsort()
    past_k, past_v = (x[:past_tokens].view(slot_shape)[inverse].contiguous() for x in (keys, values))
    k, v = (x[past_tokens:].contiguous() for x in (keys, values))
    means = _block_means(keys, shape.frame_tokens, shape.block_k)
    chunk = ChunkInputs(
        _block_means(q, shape.frame_tokens, shape.block_q),
        means[shape.past :].contiguous(),
        means[: shape.past][inverse].contiguous(),
        order.to(q.device, torch.int32),
        torch.zeros((), dtype=torch.int32, device=q.device),
        shape.frame_tokens,
        shape.block_q,
        shape.block_k,
    )
    return AttentionInputs(q, k, v, past_k, past_v, chunk, keys, values)


def random_inputs(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> AttentionInputs:
    """Normal q, k and v, frames in shuffled slots."""
    generator = torch.Generator(device).manual_seed(seed)
    tokens = shape.frames * shape.frame_tokens
    width = (shape.heads, shape.head_dim)
    q = torch.randn(CHUNK_FRAMES * shape.frame_tokens, *width, generator=generator, device=device)
    keys, values = (torch.randn(tokens, *width, generator=generator, device=device) for _ in range(2))
    order = torch.randperm(shape.past, generator=torch.Generator().manual_seed(seed)).to(device)
    return _assemble(q.to(dtype), keys.to(dtype), values.to(dtype), shape, order)


def video_inputs(shape: Shape, grid: tuple[int, int], device: str, seed: int) -> AttentionInputs:
    """Queries and keys with the structure of video attention, in float32.

    A scene of smooth texture pans slowly, objects with features of their own move through it. Heads come in three
    kinds, in turn: *local* ones attend around the same place and time, *tracking* ones to the same object wherever
    it is in any frame, *mixed* ones to both. Softmax rows are peaked but not degenerate; values carry the scene.

    Args:
        grid: rows and columns of tokens; `shape.frame_tokens` is their product.

    Raises:
        ValueError: the grid does not make the frame's tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns = grid
    if rows * columns != shape.frame_tokens:
        raise ValueError(
            f"a grid of {rows} x {columns} tokens does not make {shape.frame_tokens} tokens a frame"
        )
    time, y, x = torch.meshgrid(
        torch.arange(shape.frames), torch.arange(rows), torch.arange(columns), indexing="ij"
    )
    place = torch.stack((time, y, x), -1).flatten(0, 2).float()
    scene = _scene(place, (rows, columns), generator)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    current = slice(shape.past * shape.frame_tokens, None)
    queries, keys, values = [], [], []
    for head in range(shape.heads):
        # Random Fourier features: their dot product falls off with the distance in frames, rows and columns.
        frequency = normal(3, shape.head_dim // 2) / torch.tensor([[4.0], [3.0], [3.0]])
        near = torch.cat(((place @ frequency).cos(), (place @ frequency).sin()), -1)
        same = scene @ normal(scene.shape[1], shape.head_dim) / math.sqrt(scene.shape[1])
        near, same = near / near.norm(dim=-1, keepdim=True), same / same.norm(dim=-1, keepdim=True)
        local, tracking = ((1.0, 0.0), (0.0, 1.0), (0.7, 0.7))[head % 3]
        feature = local * near + tracking * same
        strength = math.sqrt(12.0) * shape.head_dim**0.25  # logits up to about 12 after the usual scale
        noise = 0.3 / math.sqrt(shape.head_dim)
        queries.append(strength * (feature[current] + noise * normal(*feature[current].shape)))
        keys.append(strength * (feature + noise * normal(*feature.shape)))
        values.append(scene @ normal(scene.shape[1], shape.head_dim) + 0.5 * normal(*feature.shape))
    q, k, v = (torch.stack(parts, 1).contiguous().to(device) for parts in (queries, keys, values))
    order = torch.randperm(shape.past, generator=generator).to(device)
    return _assemble(q, k, v, shape, order)


def _scene(place: Tensor, grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Content features `[tokens, 24]` of a panning texture and moving objects at `place` = (time, row, column)."""
    time, y, x = place.unbind(-1)
    height, width = grid
    pan = torch.rand(2, generator=generator) * 0.6 - 0.3  # tokens per frame
    waves = torch.randn(2, 8, generator=generator) * 0.25
    texture = torch.stack((y + pan[0] * time, x + pan[1] * time), -1) @ waves
    parts = [texture.cos(), texture.sin()]
    objects = torch.zeros(len(place), 8)
    for index in range(8):
        start = torch.rand(2, generator=generator) * torch.tensor([height, width])
        speed = torch.rand(2, generator=generator) * 1.6 - 0.8
        size = 2 + 3 * float(torch.rand((), generator=generator))
        distance = ((y - start[0] - speed[0] * time) / size) ** 2 + (
            (x - start[1] - speed[1] * time) / size
        ) ** 2
        objects[:, index] = 2.5 * torch.exp(-distance)
    return torch.cat([*parts, objects], -1)
