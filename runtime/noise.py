"""Noise of a rollout: a counter-based generator keyed by seed, chunk and step.

Each draw depends on its key alone, so the same seed gives the same bits in whatever order sessions and chunks
are served.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError

__all__ = ["MAX_SEED", "check_seed", "fill_noise"]

MAX_SEED = 2**64 - 1
_STEP_BITS = 8


def check_seed(seed: Any) -> int:
    """Return ``seed`` as an int; :class:`InputError` unless it is a whole number in [0, 2**64)."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= int(seed) <= MAX_SEED:
        raise InputError(f"seed is {seed!r}; expected a whole number from 0 to 2**64 - 1")
    return int(seed)


def fill_noise(out: NDArray[np.float32], *, seed: int, chunk: int, step: int) -> None:
    """Fill the contiguous float32 array ``out`` with standard normal noise.

    ``step`` 0 is a chunk's initial latent; step s > 0 is what re-noises it before denoising forward s.
    """
    key = np.array([seed, (chunk << _STEP_BITS) | step], dtype=np.uint64)
    np.random.Generator(np.random.Philox(key=key)).standard_normal(dtype=np.float32, out=out)
