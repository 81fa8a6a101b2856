"""Rotary position tables, computed from angles: no table to outgrow.

Angles are float64, cosines and sines are rounded once to float32. Pairs are interleaved (even, odd); the pairs
of a head belong to time first, then height, then width, each axis with its own exponents.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Model

__all__ = ["RopeTables"]


class RopeTables:
    """Cosines and sines of chunks of one model, and the rotation that moves cached keys in time."""

    def __init__(self, model: Model) -> None:
        time_dim, height_dim, width_dim = model.rope.dims_thw
        rows, columns = model.token_grid
        self._frames = model.chunk_frames
        self._time_dim = time_dim
        self._time_freqs = _frequencies(model.rope.theta, time_dim)
        row = np.outer(np.arange(rows), _frequencies(model.rope.theta, height_dim))
        column = np.outer(np.arange(columns), _frequencies(model.rope.theta, width_dim))
        space = np.concatenate(
            [
                np.broadcast_to(row[:, None], (rows, columns, height_dim // 2)),
                np.broadcast_to(column[None, :], (rows, columns, width_dim // 2)),
            ],
            axis=-1,
        ).reshape(rows * columns, -1)
        self._space_cos = np.cos(space).astype(np.float32)
        self._space_sin = np.sin(space).astype(np.float32)

    def fill(self, first_frame: int, cos: NDArray[np.float32], sin: NDArray[np.float32]) -> None:
        """Write the tables of the chunk that starts at temporal position `first_frame`.

        `cos` and `sin` are contiguous `[chunk tokens, head_dim / 2]`.
        """
        angle = np.outer(np.arange(first_frame, first_frame + self._frames), self._time_freqs)
        pairs = self._time_dim // 2
        for table, time, space in (
            (cos, np.cos(angle), self._space_cos),
            (sin, np.sin(angle), self._space_sin),
        ):
            frames = table.reshape(self._frames, -1, table.shape[-1])
            frames[..., :pairs] = time[:, None]
            frames[..., pairs:] = space

    def turn(self, frames: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Cosines and sines `[time pairs]` of the rotation that moves keys by `frames` in time."""
        angle = frames * self._time_freqs
        return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def _frequencies(theta: float, dim: int) -> NDArray[np.float64]:
    return np.asarray(theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim))
