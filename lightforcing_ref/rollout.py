"""The reference rollout: chunk by chunk, four denoising forwards and a clean pass. The oracle for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .attention import hsa_attention
from .cache import AttentionSpec, CachedAttention, FrameCache, LayerKV, SinkPositions
from .config import CHUNK_FRAMES
from .model import CausalWanModel, CrossKV
from .rope import rope_tables
from .schedule import FlowSchedule

__all__ = ["Noise", "Recache", "Rollout"]

Noise = Callable[[int, int], Tensor]
"""(chunk, step) -> noise `[channels, frames, h, w]`; step 0 is the initial latent, later ones are re-noising."""

Recache = Literal["window", "all", "none"]
"""Which cached frames a prompt switch recomputes: all but the sinks, all, or none."""


@dataclass
class Rollout:
    """Generates latents chunk by chunk.

    Args:
        text: text-encoder output `[text_len, text_dim]`.
        window_frames: attention window in latent frames, sink and current chunk included; None = unlimited.

    The clean pass of a chunk runs when the next chunk is asked for, never after the last.
    """

    model: CausalWanModel
    spec: AttentionSpec
    text: Tensor
    noise: Noise
    grid: tuple[int, int]
    """Tokens per frame as (height, width)."""
    window_frames: int | None = None
    sink_frames: int = 0
    sink_positions: SinkPositions = "absolute"
    schedule: FlowSchedule = field(default_factory=FlowSchedule.warped)
    attend: Callable[..., Tensor] | Sequence[Callable[..., Tensor]] = hsa_attention
    """The attention operator, one for all layers or one for each; the oracle unless another execution or policy is
    under study."""

    def __post_init__(self) -> None:
        self.cache = FrameCache(
            self.model.config, self.spec.geometry, self.window_frames, self.sink_frames, self.sink_positions
        )
        self.latents: dict[int, Tensor] = {}
        self.next_chunk = 0
        self._pending: Tensor | None = None
        self.cross = self._condition(self.text)

    def _condition(self, text: Tensor) -> list[CrossKV]:
        with torch.no_grad():
            return self.model.embed_text(text[None])

    def set_prompt(self, text: Tensor, recache: Recache = "window") -> int:
        """Switch the prompt from the next chunk on, recomputing cached frames block-causally, oldest first.

        Returns the index of the chunk where the new prompt applies.
        """
        self._commit_pending()
        self.cross = self._condition(text)
        if recache == "none" or self.next_chunk == 0:
            return self.next_chunk
        self.cache.make_room(CHUNK_FRAMES)
        resident = self.cache.resident()
        renewed = [frame for frame in resident if recache == "all" or frame >= self.sink_frames]
        for chunk in sorted({frame // CHUNK_FRAMES for frame in renewed}):
            first = chunk * CHUNK_FRAMES
            older = [frame for frame in resident if frame < first]
            _, new = self.forward(self.latents[chunk], self.schedule.clean_step, chunk, older)
            self.cache.commit(first, new, only=renewed)
        return self.next_chunk

    def past(self, layer: int, chunk: int, frames: list[int] | None = None) -> LayerKV:
        """Keys, values and block means that `chunk` sees in `layer`: those of `frames`, by default all resident."""
        resident = self.cache.resident()
        recent = [frame for frame in resident if frame >= self.sink_frames]
        first_recent = recent[0] if recent else chunk * CHUNK_FRAMES
        return self.cache.past(layer, resident if frames is None else frames, first_recent)

    def forward(
        self, x: Tensor, step: int, chunk: int, past_frames: list[int] | None = None
    ) -> tuple[Tensor, list[LayerKV]]:
        """One forward of one chunk: (flow `[channels, frames, h, w]`, new keys and values per layer)."""
        frames = self.cache.resident() if past_frames is None else past_frames
        config = self.model.config
        positions = torch.arange(chunk * CHUNK_FRAMES, (chunk + 1) * CHUNK_FRAMES)
        cos, sin = rope_tables(positions, self.grid, config.head_dim, theta=config.rope_theta)
        core = CachedAttention(
            self.spec,
            cos,
            sin,
            [self.past(layer, chunk, frames) for layer in range(config.layers)],
            torch.arange(len(frames), dtype=torch.int32),
            chunk,
            attend=self.attend,
        )
        t = torch.full((1, CHUNK_FRAMES), self.schedule.timesteps[step], dtype=torch.float64)
        with torch.no_grad():
            flow = self.model(x[None], t, self.cross, core)[0]
        return flow, core.new

    def step(self, x: Tensor, step: int, chunk: int) -> tuple[Tensor, Tensor]:
        """One denoising forward and scheduler step: (next latent, x0), float32; x0 in float64 inside."""
        flow, _ = self.forward(x, step, chunk)
        x0 = (x.double() - self.schedule.sigmas[step] * flow.double()).float()
        sigma = self.schedule.sigmas[step + 1]
        if step + 1 == self.schedule.clean_step:
            return x0, x0
        return (1 - sigma) * x0 + sigma * self.noise(chunk, step + 1), x0

    def _commit_pending(self) -> None:
        if self._pending is None:
            return
        self.commit(self._pending, self.next_chunk - 1)
        self._pending = None

    def commit(self, x0: Tensor, chunk: int) -> None:
        """Run the clean pass of `chunk` on its latents and cache what it leaves."""
        _, new = self.forward(x0, self.schedule.clean_step, chunk)
        self.cache.commit(chunk * CHUNK_FRAMES, new)
        self.latents[chunk] = x0

    def generate_chunk(self) -> Tensor:
        """Clean latents of the next chunk, `[channels, CHUNK_FRAMES, h, w]` float32."""
        self._commit_pending()
        self.cache.make_room(CHUNK_FRAMES)
        chunk = self.next_chunk
        x = self.noise(chunk, 0)
        for step in range(self.schedule.denoise_steps):
            x, _ = self.step(x, step, chunk)
        self._pending = x
        self.next_chunk += 1
        return x

    def give_chunk(self, latents: Tensor) -> None:
        """Take the next chunk's clean latents `[channels, CHUNK_FRAMES, h, w]` as they are, in place of denoising."""
        self._commit_pending()
        self.cache.make_room(CHUNK_FRAMES)
        self._pending = latents
        self.next_chunk += 1

    def stream(self, chunks: int) -> Iterator[Tensor]:
        """Generate `chunks` more chunks."""
        for _ in range(chunks):
            yield self.generate_chunk()
