# mypy: allow-untyped-calls, no-warn-return-any
"""Batched self-attention for training: whole windows at once, or chunk by chunk with a cache; dense or sparse.

Numerically the reference's attention; the reference serves one clip at a time, training wants many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from lightforcing_ref.attention import hsa_selection, rms_norm
from lightforcing_ref.cache import AttentionSpec
from lightforcing_ref.config import CHUNK_FRAMES
from lightforcing_ref.model import QKVParams

__all__ = ["CachedCore", "Segment", "WindowCore", "causal_layout", "forcing_layout"]


@dataclass(frozen=True)
class Segment:
    """One chunk in a training window: its place in the clip and the earlier segments that it sees besides itself."""

    chunk: int
    context: tuple[int, ...]


def causal_layout(chunks: Sequence[int]) -> list[Segment]:
    """Every chunk sees all chunks before it, whatever their noise."""
    return [Segment(chunk, tuple(range(index))) for index, chunk in enumerate(chunks)]


def forcing_layout(chunks: Sequence[int]) -> list[Segment]:
    """All chunks but the last clean, then noisy ones, each of which sees the clean ones before it, as in a rollout.

    The first chunk has a noisy copy only if it is chunk 0: what came before any other is missing.
    """
    return [*causal_layout(chunks[:-1]), *causal_layout(chunks)[min(1, chunks[0]) :]]


def prepare(
    qkv: Tensor, params: QKVParams, cos: Tensor, sin: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """QKPrepare without block means: `[B, T, 3 H D]` to q, k, v `[B, H, T, D]`."""
    q, k, v = (qkv + params.bias).chunk(3, dim=-1)
    q, k = rms_norm(q, params.norm_q, params.eps), rms_norm(k, params.norm_k, params.eps)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor, chunk: int, spec: AttentionSpec | None) -> Tensor:
    """Attention of one chunk's q `[B, H, T, D]` over k, v `[B, H, past + T, D]`; sparse if there is a spec."""
    if spec is None or k.shape[2] == q.shape[2]:
        return F.scaled_dot_product_attention(q, k, v)
    geometry = spec.geometry
    past_frames = (k.shape[2] - q.shape[2]) // geometry.frame_tokens
    with torch.no_grad():
        q_mean, k_mean = (
            x.unflatten(2, (-1, blocks, geometry.frame_tokens // blocks))
            .mean(4)
            .flatten(0, 1)
            .permute(1, 2, 0, 3)
            for x, blocks in ((q, geometry.q_blocks), (k, geometry.k_blocks))
        )
        # The selection knows heads only; the clips of a batch are so many more of them.
        selected = hsa_selection(
            q_mean, k_mean, past_frames=past_frames, chunk=chunk, hsa=spec.hsa, keep_q20=spec.keep_q20
        )
    # Every row selects the same number of blocks: gathering them costs less than masking the others.
    rows, key_blocks = selected.shape[:2].numel(), selected.shape[2]
    chosen = selected.nonzero()
    index = chosen[:, 0] * key_blocks + chosen[:, 2]
    seen_k, seen_v = (
        x.reshape(-1, geometry.block_k * x.shape[3]).index_select(0, index).view(rows, -1, x.shape[3])
        for x in (k, v)
    )
    out = F.scaled_dot_product_attention(q.reshape(rows, geometry.block_q, -1), seen_k, seen_v)
    return out.view(q.shape)


@dataclass
class WindowCore:
    """A `SelfAttentionCore` for a window of segments, each of one chunk's tokens.

    Args:
        cos, sin: float32 `[T, D/2]`, each segment at its own position.
        spec: sparse attention; None = dense.
    """

    layout: Sequence[Segment]
    heads: int
    cos: Tensor
    sin: Tensor
    spec: AttentionSpec | None = None

    def __call__(self, layer: int, qkv: Tensor, params: QKVParams) -> Tensor:
        q, k, v = prepare(qkv, params, self.cos, self.sin, self.heads)
        size = q.shape[2] // len(self.layout)
        parts_q, parts_k, parts_v = (x.split(size, dim=2) for x in (q, k, v))
        out = []
        for index, segment in enumerate(self.layout):
            seen = (*segment.context, index)
            keys, values = (torch.cat([parts[i] for i in seen], dim=2) for parts in (parts_k, parts_v))
            out.append(attend(parts_q[index], keys, values, segment.chunk, self.spec))
        return torch.cat(out, dim=2).transpose(1, 2).flatten(2)


@dataclass
class CachedCore:
    """A `SelfAttentionCore` for one chunk after the cached ones; leaves the chunk's keys and values in `new`."""

    chunk: int
    heads: int
    cos: Tensor
    sin: Tensor
    past: Sequence[tuple[Tensor, Tensor]] | None
    """Per layer, k and v `[B, H, tokens, D]`; None = first chunk."""
    spec: AttentionSpec | None = None
    new: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, layer: int, qkv: Tensor, params: QKVParams) -> Tensor:
        q, k, v = prepare(qkv, params, self.cos, self.sin, self.heads)
        self.new.append((k, v))
        if self.past is not None:
            k, v = (torch.cat([old, new], dim=2) for old, new in zip(self.past[layer], (k, v), strict=True))
        return attend(q, k, v, self.chunk, self.spec).transpose(1, 2).flatten(2)


def chunk_positions(chunks: Sequence[int], frames: int = CHUNK_FRAMES) -> Tensor:
    """Temporal position of every latent frame of `chunks`, which have `frames` each."""
    return torch.cat([torch.arange(c * frames, (c + 1) * frames) for c in chunks])
