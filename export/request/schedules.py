"""A variant's section `[schedule]`: in how many forwards a chunk is made, and how many frames it has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lightforcing_ref.schedule import STEPS, FlowSchedule

__all__ = ["SchedulePolicy"]

_Steps = Annotated[tuple[Annotated[int, Field(gt=0, le=1000)], ...], Field(max_length=8)]


class SchedulePolicy(BaseModel):
    """How a chunk is made; its weights must have been distilled for that.

    Attributes:
        steps: timesteps of the denoising forwards of a chunk, before they are warped, largest first.
        first_steps: those of the first chunk, where it has others.
        shift: warps them; 1 leaves them as they are.
        chunk_frames: latent frames of a chunk.
        clean_forward: whether the cache takes a chunk's keys and values from a forward on its clean latent; otherwise
            from its last denoising forward.
        rolling: whether a forward denoises a window of chunks, one at each step, of which the oldest then leaves.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: Annotated[_Steps, Field(min_length=1)] = STEPS
    first_steps: _Steps = ()
    shift: Annotated[float, Field(ge=1, le=100)] = 5.0
    chunk_frames: Literal[1, 3] = 3
    clean_forward: bool = True
    rolling: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> SchedulePolicy:
        for name in ("steps", "first_steps"):
            steps = getattr(self, name)
            if list(steps) != sorted(set(steps), reverse=True):
                raise ValueError(
                    f"{name} is {list(steps)}; expected timesteps that fall, from at most 1000 to above 0"
                )
            if steps and steps[0] != 1000:
                raise ValueError(
                    f"{name} begins at {steps[0]}; expected 1000, because a chunk begins as pure noise"
                )
        if self.rolling and (self.first_steps or not self.clean_forward or len(self.steps) < 2):
            raise ValueError(
                "rolling is for two steps or more, the same for every chunk, and a clean forward: leave first_steps "
                "and clean_forward out"
            )
        return self

    @property
    def window_chunks(self) -> int:
        """Chunks that a denoising forward has: one, unless the schedule is rolling."""
        return len(self.steps) if self.rolling else 1

    @property
    def described(self) -> str:
        """In words."""
        frames = f"{self.chunk_frames} latent frame{'s' if self.chunk_frames > 1 else ''} a chunk"
        first = f", {_listed(self.first_steps)} for the first" if self.first_steps else ""
        clean = "" if self.clean_forward else ", no clean forward"
        if self.rolling:
            clean = f", {len(self.steps)} chunks at once, rolling"
        return f"{frames} in steps {_listed(self.steps)}{first} (shift {self.shift:g}){clean}"

    def resolved(self) -> FlowSchedule:
        """The timesteps and noise levels."""
        return FlowSchedule.warped(
            self.steps,
            shift=self.shift,
            first_steps=self.first_steps,
            chunk_frames=self.chunk_frames,
            clean_forward=self.clean_forward,
        )


def _listed(steps: Iterable[int]) -> str:
    return ", ".join(map(str, steps))
