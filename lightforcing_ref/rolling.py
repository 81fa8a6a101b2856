"""Rolling Forcing (arXiv 2509.25161) as a reference rollout: five chunks at five noise levels in one joint window.

Written from the published description alone. Its code and weights are for academic use; nothing of them is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from .attention import hsa_attention
from .cache import AttentionSpec, CachedAttention, FrameCache, LayerKV
from .model import CausalWanModel
from .rollout import Noise
from .rope import rope_tables
from .schedule import FlowSchedule

__all__ = ["ROLLING_STEPS", "RollingRollout"]

ROLLING_STEPS = (1000, 800, 600, 400, 200)
"""Its steps, before they are warped: one for each chunk of the window."""


@dataclass
class RollingRollout:
    """Generates latents with a window of chunks at falling noise levels, of which the oldest leaves at every step.

    Window w holds chunks w - 4 to w, each one step further than in the window before; the newest is pure noise. All of
    them see each other. They also see the first chunk of the video, the *anchor*, turned to the frames before the
    latest clean ones, and these. A chunk that leaves is passed once more, alone and clean, for its keys and values.

    Args:
        text: text-encoder output `[text_len, text_dim]`.
        noise: as `Rollout` takes it; the last step of a chunk is not re-noised.
    """

    model: CausalWanModel
    spec: AttentionSpec
    text: Tensor
    noise: Noise
    grid: tuple[int, int]
    """Tokens per frame as (height, width)."""
    schedule: FlowSchedule = field(default_factory=lambda: FlowSchedule.warped(ROLLING_STEPS))
    attention_frames: int = 21
    """Frames that one forward may see, its own included."""
    attend: Callable[..., Tensor] | Sequence[Callable[..., Tensor]] = hsa_attention
    """The attention operator, as `Rollout` takes it."""

    def __post_init__(self) -> None:
        frames = self.schedule.chunk_frames
        # The anchor besides as many frames as a clean forward sees.
        capacity = self.attention_frames + frames
        self.cache = FrameCache(
            self.model.config, self.spec.geometry, capacity, frames, "window", self.spec.kv
        )
        self._pending: tuple[Tensor, int] | None = None
        self.set_prompt(self.text)

    @property
    def window_chunks(self) -> int:
        """Chunks of a full window."""
        return self.schedule.denoise_steps

    def set_prompt(self, text: Tensor) -> None:
        """Switch the prompt from the next window on. Chunks of the window go on under it; what is cached stays, and the
        chunk that left last is cached under the prompt before.
        """
        self._commit_pending()
        with torch.no_grad():
            self.cross = self.model.embed_text(text[None])

    def generate(self, chunks: int | None = None) -> Iterator[Tensor]:
        """Clean latents `[channels, chunk_frames, h, w]` float32 of a video of so many chunks, one by one.

        The window fills at the beginning, and at the end no new noise enters. None = a video without an end.
        """
        last_row = self.schedule.denoise_steps - 1
        latents: dict[int, Tensor] = {}
        for window in count() if chunks is None else range(chunks + last_row):
            self._commit_pending()
            if chunks is None or window < chunks:
                latents[window] = self.noise(window, 0)
            members = sorted(latents)
            flow, _ = self._forward(
                latents, {chunk: window - chunk for chunk in members}, self._context(members)
            )
            for chunk, part in zip(members, flow.split(self.schedule.chunk_frames, dim=1), strict=True):
                row = window - chunk
                sigma, following = self.schedule.row_sigmas[row], self.schedule.row_following[row]
                x0 = (latents[chunk].double() - sigma * part.double()).float()
                if row < last_row:
                    x0 = (1 - following) * x0 + following * self.noise(chunk, row + 1)
                latents[chunk] = x0
            if window >= last_row:
                chunk = members[0]
                self._pending = latents.pop(chunk), chunk
                yield self._pending[0]

    def _context(self, members: list[int]) -> list[int]:
        """Cached frames that a window sees: the anchor, and the latest that its attention has room for."""
        frames = self.schedule.chunk_frames
        resident = self.cache.resident()
        anchor = [frame for frame in resident if frame < frames]
        room = max(0, self.attention_frames - frames * len(members) - len(anchor))
        recent = [frame for frame in resident if frame >= frames]
        return anchor + recent[len(recent) - min(room, len(recent)) :]

    def _commit_pending(self) -> None:
        """The clean forward of the chunk that left last, which sees the latest frames, whether or not the anchor is one
        of them.
        """
        if self._pending is None:
            return
        (x0, chunk), self._pending = self._pending, None
        frames = self.schedule.chunk_frames
        self.cache.make_room(frames)
        resident = self.cache.resident()
        room = self.attention_frames - frames
        seen = resident[len(resident) - min(room, len(resident)) :]
        _, new = self._forward({chunk: x0}, {chunk: self.schedule.clean_step}, seen)
        self.cache.commit(chunk * frames, new)

    def _forward(
        self, latents: dict[int, Tensor], rows: dict[int, int], past: list[int]
    ) -> tuple[Tensor, list[LayerKV]]:
        """One forward of some chunks, each in a row of the schedule of its own; they see each other and `past`."""
        config, frames = self.model.config, self.schedule.chunk_frames
        chunks = sorted(rows)
        positions = torch.tensor([chunk * frames + index for chunk in chunks for index in range(frames)])
        cos, sin = rope_tables(positions, self.grid, config.head_dim, theta=config.rope_theta)
        first_recent = next((frame for frame in past if frame >= frames), chunks[0] * frames)
        core = CachedAttention(
            self.spec,
            cos,
            sin,
            [self.cache.past(layer, past, first_recent) for layer in range(config.layers)],
            torch.arange(len(past), dtype=torch.int32),
            chunks[-1],
            attend=self.attend,
        )
        timesteps = [self.schedule.row_timesteps[rows[chunk]] for chunk in chunks for _ in range(frames)]
        t = torch.tensor([timesteps], dtype=torch.float64)
        x = torch.cat([latents[chunk] for chunk in chunks], dim=1)
        with torch.no_grad():
            flow = self.model(x[None], t, self.cross, core)[0]
        return flow, core.new
