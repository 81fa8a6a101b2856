"""Numbers of eight bits, E4M3: what codes stand for, and the codes of blocks; in numpy alone.

A code has a sign, four bits of exponent (bias 7) and three of mantissa; the largest number is 448. Keys and values of
bundles whose manifest says `cache.kv` `fp8` are such codes, with a scale for every block of tokens and head
(docs/operators.md).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["E4M3_MAX", "SMALLEST_SCALE", "decode", "encode", "narrow", "widen"]

E4M3_MAX: Final = np.float32(448)
SMALLEST_SCALE: Final = np.float32(2.0**-24)

_CODES: Final = np.arange(128)
_MAGNITUDES: Final = np.where(
    _CODES < 8, _CODES * 2.0**-9, (8 + _CODES % 8) * 2.0 ** (_CODES // 8 - 10.0)
).astype(np.float32)
_TABLE: Final = np.concatenate((_MAGNITUDES, -_MAGNITUDES))
"""What each code stands for. Those of NaN, which nothing here writes, stand for 480."""


def decode(codes: NDArray[Any]) -> NDArray[np.float32]:
    """What uint8 codes stand for."""
    wide: NDArray[np.float32] = _TABLE[codes]
    return wide


def encode(x: NDArray[Any]) -> NDArray[np.uint8]:
    """The codes of numbers, to nearest even; what is larger than 448 becomes 448."""
    magnitude = np.minimum(np.abs(x.astype(np.float32)), E4M3_MAX)
    bits = magnitude.view(np.uint32)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6, numbers are multiples of 2^-9: the sum with 2^23 has the nearest one in its last bits.
    subnormal = (magnitude * np.float32(2**9) + np.float32(2**23)).view(np.uint32) & 0xFF
    code = np.where(magnitude < np.float32(2.0**-6), subnormal, normal)
    return np.where(x < 0, code | 0x80, code).astype(np.uint8)


def _per_token(blocks: NDArray[Any], frame_tokens: int, block: int) -> NDArray[Any]:
    """What belongs to blocks, for each of their tokens."""
    return np.repeat(blocks, block, axis=0)[:frame_tokens]


def widen(codes: NDArray[Any], scales: NDArray[Any], block: int) -> NDArray[np.float32]:
    """Codes of a frame `[tokens, heads, dim]` times the scales of their blocks `[blocks, heads]`."""
    wide: NDArray[np.float32] = decode(codes) * _per_token(scales, len(codes), block)[..., None]
    return wide


def narrow(x: NDArray[np.float32], block: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes of a frame `[tokens, heads, dim]`, and the scales of its blocks `[blocks, heads]`."""
    largest = np.abs(x).max(axis=-1)
    starts = np.arange(0, len(x), block)
    scales = np.maximum(np.maximum.reduceat(largest, starts, axis=0) / E4M3_MAX, SMALLEST_SCALE)
    return encode(x / _per_token(scales, len(x), block)[..., None]), scales
