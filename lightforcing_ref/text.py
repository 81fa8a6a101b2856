"""UMT5 text encoder."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["UMT5_TINY", "UMT5_XXL", "UMT5Config"]


@dataclass(frozen=True)
class UMT5Config:
    """Dimensions of a UMT5 encoder."""

    vocab: int
    d_model: int
    d_ff: int
    heads: int
    d_kv: int
    layers: int
    eps: float = 1e-6
    buckets: int = 32
    """Relative-position buckets, both directions together."""
    max_distance: int = 128
    """Distance in tokens from which on all positions share a bucket."""
    pad_id: int = 0
    eos_id: int = 1


UMT5_XXL = UMT5Config(vocab=256384, d_model=4096, d_ff=10240, heads=64, d_kv=64, layers=24)
UMT5_TINY = UMT5Config(vocab=259, d_model=64, d_ff=128, heads=4, d_kv=16, layers=2)
"""Reads bytes: ids 0 pad, 1 end, 2 unknown, then byte b at 3 + b."""
