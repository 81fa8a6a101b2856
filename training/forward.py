# mypy: allow-untyped-calls, no-warn-return-any
"""The transformer's forward for training, and batched rollouts with it.

`predict_flow` computes what `CausalWanModel.forward` computes, with modulations broadcast over each frame's tokens
and not copied to them, which saves a tenth of the time and more of the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from lightforcing_ref.cache import AttentionSpec
from lightforcing_ref.config import CHUNK_FRAMES
from lightforcing_ref.model import Block, CausalWanModel, CrossKV, SelfAttentionCore
from lightforcing_ref.rope import rope_tables
from lightforcing_ref.schedule import FlowSchedule

from .attention import CachedCore, Segment, WindowCore, chunk_positions

__all__ = ["BatchRollout", "predict_flow", "window_core"]


def predict_flow(
    model: CausalWanModel,
    x: Tensor,
    t: Tensor,
    cross: Sequence[CrossKV],
    core: SelfAttentionCore,
    watch: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Flow for latents `[B, C, F, h, w]` at timesteps `[B, F]`.

    Args:
        watch: called after each block with its index and tokens `[B, F, FT, dim]`.
    """
    frames, height, width = x.shape[2:]
    tokens = model.tokens(x).unflatten(1, (frames, -1))
    e, e0 = model.modulations(t)
    for layer, module in enumerate(model.blocks):
        block = cast(Block, module)
        parts = (block.modulation + e0)[:, :, :, None].unbind(2)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        normed = block.norm1(tokens) * (1 + scale1) + shift1
        tokens = tokens + gate1 * block.self_attn(normed.flatten(1, 2), layer, core).view_as(tokens)
        seen = block.cross_attn(block.norm3(tokens).flatten(1, 2), cross[layer])
        tokens = tokens + seen.view_as(tokens)
        tokens = tokens + gate2 * block.ffn(block.norm2(tokens) * (1 + scale2) + shift2)
        if watch is not None:
            watch(layer, tokens)
    shift, scale = (model.head.modulation + e[:, :, None])[:, :, :, None].unbind(2)
    out = model.head.head(model.head.norm(tokens) * (1 + scale) + shift)
    return model.latents(out.flatten(1, 2), frames, height, width)


def window_core(
    model: CausalWanModel,
    layout: Sequence[Segment],
    grid: tuple[int, int],
    spec: AttentionSpec | None = None,
    frames: int = CHUNK_FRAMES,
) -> WindowCore:
    """The attention of a training window whose chunks have `frames` latent frames each."""
    positions = chunk_positions([segment.chunk for segment in layout], frames)
    cos, sin = rope_tables(positions, grid, model.config.head_dim, theta=model.config.rope_theta)
    return WindowCore(layout, model.config.heads, cos, sin, spec)


@dataclass
class BatchRollout:
    """Generates clips of a batch chunk by chunk, without gradients, attending to all chunks before.

    Args:
        text: `[B, text_len, text_dim]`.
        spec: sparse attention; None = dense.
    """

    model: CausalWanModel
    text: Tensor
    grid: tuple[int, int]
    spec: AttentionSpec | None = None
    schedule: FlowSchedule = field(default_factory=FlowSchedule.warped)

    def __post_init__(self) -> None:
        self.past: list[tuple[Tensor, Tensor]] | None = None
        self.chunk = 0
        with torch.no_grad():
            self.cross = self.model.embed_text(self.text)

    @torch.no_grad()
    def flow(self, x: Tensor, sigma: float) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Flow of the next chunk `[B, C, F, h, w]` at `sigma`, and its keys and values."""
        config, frames = self.model.config, self.schedule.chunk_frames
        cos, sin = rope_tables(chunk_positions([self.chunk], frames), self.grid, config.head_dim)
        core = CachedCore(self.chunk, config.heads, cos, sin, self.past, self.spec)
        t = torch.full((x.shape[0], frames), 1000 * sigma)
        return predict_flow(self.model, x, t, self.cross, core), core.new

    @torch.no_grad()
    def commit(self, x0: Tensor) -> None:
        """Put a clean chunk into the cache."""
        _, new = self.flow(x0, 0.0)
        if self.past is None:
            self.past = new
        else:
            self.past = [
                (torch.cat([pk, k], 2), torch.cat([pv, v], 2))
                for (pk, pv), (k, v) in zip(self.past, new, strict=True)
            ]
        self.chunk += 1

    def few_steps(self, noise: Callable[[], Tensor]) -> Tensor:
        """The next chunk by the schedule; `noise` gives fresh noise at every call."""
        x = noise()
        for row in self.schedule.rows(self.chunk):
            sigma, following = self.schedule.row_sigmas[row], self.schedule.row_following[row]
            x = x - sigma * self.flow(x, sigma)[0]
            if following:
                x = (1 - following) * x + following * noise()
        return x

    def chunks(self, count: int, noise: Callable[[], Tensor]) -> Iterator[Tensor]:
        """The next `count` chunks, each in the cache before it is given out."""
        for _ in range(count):
            chunk = self.few_steps(noise)
            self.commit(chunk)
            yield chunk
