"""The warped few-step flow-matching schedule of Self-Forcing. No dependencies.

Source: Self-Forcing (timesteps 1000, 750, 500, 250 warped with shift 5) and its 1000-entry scheduler table.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FlowSchedule"]


@dataclass(frozen=True)
class FlowSchedule:
    """Timesteps and noise levels of one chunk's forwards; the last entry is the clean pass at t = 0.

    x_t = (1 - sigma) x0 + sigma eps, and the model predicts the flow eps - x0, so x0 = x_t - sigma * flow.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]

    @property
    def denoise_steps(self) -> int:
        """Forwards that produce the chunk; the clean pass is not counted."""
        return len(self.timesteps) - 1

    @property
    def clean_step(self) -> int:
        """Index of the clean pass."""
        return len(self.timesteps) - 1

    @classmethod
    def warped(
        cls, steps: tuple[int, ...] = (1000, 750, 500, 250), *, shift: float = 5.0, table: int = 1000
    ) -> FlowSchedule:
        """Warp `steps` with `shift`: entry j of the table is sigma = shift s / (1 + (shift - 1) s), s = 1 - j/table.

        A step t addresses entry `table - t`, and the timestep given to the model is 1000 sigma.
        """
        linear = [step / table for step in steps]
        sigmas = tuple(shift * s / (1 + (shift - 1) * s) for s in linear)
        return cls(timesteps=(*(1000 * s for s in sigmas), 0.0), sigmas=(*sigmas, 0.0))
