"""Noise of a rollout: a counter-based generator keyed by seed, chunk and step.

Each draw depends on its key alone, so the same seed gives the same bits in whatever order sessions and chunks
are served.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import InputError

__all__ = ["MAX_SEED", "NoiseSource", "check_noise", "check_seed", "fill_noise"]

NoiseSource = Callable[[int, int], ArrayLike]
"""Noise of the caller's own: chunk and step -> `[channels, frames, h, w]`, steps as `fill_noise` has them."""

MAX_SEED = 2**64 - 1
_STEP_BITS = 8


def check_seed(seed: Any) -> int:
    """Return `seed` as an int.

    Raises:
        InputError: it is no whole number from 0 to 2**64 - 1.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= int(seed) <= MAX_SEED:
        raise InputError(f"seed is {seed!r}; expected a whole number from 0 to 2**64 - 1")
    return int(seed)


def fill_noise(out: NDArray[np.float32], *, seed: int, chunk: int, step: int) -> None:
    """Fill the contiguous float32 array `out` with standard normal noise.

    `step` 0 is a chunk's initial latent; step s > 0 is what re-noises it before denoising forward s.
    """
    key = np.array([seed, (chunk << _STEP_BITS) | step], dtype=np.uint64)
    np.random.Generator(np.random.Philox(key=key)).standard_normal(dtype=np.float32, out=out)


def check_noise(noise: ArrayLike | NoiseSource, shape: tuple[int, ...]) -> NoiseSource:
    """A caller's noise as a function that gives checked float32 arrays.

    `noise` is such a function, or an array `[chunks, *shape]`; `shape` is a chunk's, `[steps, channels, frames,
    h, w]`.

    Raises:
        InputError: an array of another shape or type. The function raises it for a chunk that there is no noise for,
            and for values that are not finite.
    """
    source: NoiseSource
    if callable(noise):
        source = noise
    else:
        array = np.asarray(noise)
        if array.shape[1:] != shape or not len(array):
            raise InputError(
                f"noise has shape {list(array.shape)}; expected [chunks, {', '.join(map(str, shape))}]: chunks, steps, "
                "channels, latent frames, height, width"
            )

        def source(chunk: int, step: int) -> ArrayLike:
            if chunk >= len(array):
                raise InputError(
                    f"chunk {chunk} needs noise, and the noise given is that of {len(array)} chunks"
                )
            return np.asarray(array[chunk, step])

    def checked(chunk: int, step: int) -> NDArray[np.float32]:
        found = np.asarray(source(chunk, step))
        if found.dtype.kind not in "fiu" or found.shape != shape[1:]:
            raise InputError(
                f"the noise of chunk {chunk}, step {step}, is {found.dtype} {list(found.shape)}; expected floating "
                f"point {list(shape[1:])}"
            )
        with np.errstate(over="ignore"):  # becomes infinite and is refused below
            found = found.astype(np.float32)
        if not np.isfinite(found).all():
            raise InputError(f"the noise of chunk {chunk}, step {step}, holds values that are not finite")
        return found

    return checked
