"""Sizes as people read them."""

from __future__ import annotations

__all__ = ["readable_size"]


def readable_size(count: float) -> str:
    """`count` bytes in the largest unit that they fill: `2.33 GiB`, `17.6 MiB`, `1.5 KiB`, `12 B`."""
    for unit, scale, digits in (("GiB", 30, 2), ("MiB", 20, 1), ("KiB", 10, 1)):
        if count >= 1 << scale:
            return f"{count / (1 << scale):.{digits}f} {unit}"
    return f"{count:.0f} B"
