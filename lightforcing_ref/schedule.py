"""The warped few-step flow-matching schedules of Self-Forcing and its successors. Needs no PyTorch.

Sources: Self-Forcing (timesteps 1000, 750, 500, 250 warped with shift 5, its 1000-entry scheduler table); Causal
Forcing++ (one frame a chunk, one or two steps, and four for the first chunk).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .config import CHUNK_FRAMES

__all__ = ["STEPS", "FlowSchedule"]

STEPS = (1000, 750, 500, 250)
"""Self-Forcing's steps, before they are warped."""


@dataclass(frozen=True)
class FlowSchedule:
    """How a chunk is made: how many frames it has, the timesteps and noise levels of its forwards, the clean pass.

    x_t = (1 - sigma) x0 + sigma eps, and the model predicts the flow eps - x0, so x0 = x_t - sigma * flow.

    Forwards are numbered by their *row*, which is what modulation tables are indexed by: the denoising forwards of a
    chunk, the clean pass, then those of the first chunk where it has others.

    Attributes:
        timesteps, sigmas: of the denoising forwards, then those of the clean pass, which are 0.
        first_timesteps, first_sigmas: of the first chunk's denoising forwards; empty = those of every chunk.
        chunk_frames: latent frames of a chunk.
        clean_forward: whether the cache takes a chunk's keys and values from a clean pass; otherwise from the last
            denoising forward.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    first_timesteps: tuple[float, ...] = ()
    first_sigmas: tuple[float, ...] = ()
    chunk_frames: int = CHUNK_FRAMES
    clean_forward: bool = True

    @property
    def denoise_steps(self) -> int:
        """Forwards that produce a chunk after the first; the clean pass is not counted."""
        return len(self.timesteps) - 1

    @property
    def most_steps(self) -> int:
        """Denoising forwards of the chunk that has most."""
        return max(self.denoise_steps, len(self.first_timesteps))

    @property
    def noises(self) -> int:
        """Latents of noise that a chunk is given: one for each forward, and at least two, because the last forward
        takes one that it does not use.
        """
        return max(2, self.most_steps)

    @property
    def clean_step(self) -> int:
        """Row of the clean pass."""
        return len(self.timesteps) - 1

    @property
    def row_timesteps(self) -> tuple[float, ...]:
        """The timestep of every row."""
        return (*self.timesteps, *self.first_timesteps)

    @property
    def row_sigmas(self) -> tuple[float, ...]:
        """The noise level of every row."""
        return (*self.sigmas, *self.first_sigmas)

    @property
    def row_following(self) -> tuple[float, ...]:
        """The noise level that each row's prediction is re-noised to; 0 behind the last of a chunk."""
        first = (*self.first_sigmas[1:], 0.0) if self.first_sigmas else ()
        return (*self.sigmas[1:], 0.0, *first)

    def rows(self, chunk: int) -> range:
        """Rows of the denoising forwards of `chunk`, in order."""
        if chunk == 0 and self.first_timesteps:
            return range(len(self.timesteps), len(self.timesteps) + len(self.first_timesteps))
        return range(self.denoise_steps)

    @classmethod
    def warped(
        cls,
        steps: Sequence[float] = STEPS,
        *,
        shift: float = 5.0,
        table: int = 1000,
        first_steps: Sequence[float] = (),
        chunk_frames: int = CHUNK_FRAMES,
        clean_forward: bool = True,
    ) -> FlowSchedule:
        """Warp `steps` with `shift`: entry j of the table is sigma = shift s / (1 + (shift - 1) s), s = 1 - j/table.

        A step t addresses entry `table - t`, and the timestep given to the model is 1000 sigma. `first_steps` are
        those of the first chunk, where they are others.
        """

        def warp(values: Sequence[float]) -> tuple[float, ...]:
            return tuple(shift * s / (1 + (shift - 1) * s) for s in (value / table for value in values))

        sigmas, first = warp(steps), warp(first_steps)
        return cls(
            timesteps=(*(1000 * s for s in sigmas), 0.0),
            sigmas=(*sigmas, 0.0),
            first_timesteps=tuple(1000 * s for s in first),
            first_sigmas=first,
            chunk_frames=chunk_frames,
            clean_forward=clean_forward,
        )
