"""Other servers of the same bundle behind one address: whether one of them has room. Knows no cluster."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

__all__ = ["REPORT_LASTS", "Neighbours", "keep_reporting"]

REPORT_LASTS = 5.0
"""Seconds after which a report that was not repeated is old."""
_LOOK_EVERY = 0.2


class Neighbours(Protocol):
    """What a server asks and tells the others."""

    async def report(self, free: int) -> None:
        """Tell how many places are free here."""

    async def have_room(self) -> bool:
        """Whether another server has a free place."""


async def keep_reporting(neighbours: Neighbours, free: Callable[[], int]) -> None:
    """Tell the neighbours about free places, when their number changes and now and then."""
    told, since = -1, 0.0
    while True:
        now = free()
        if now != told or time.monotonic() - since > REPORT_LASTS / 3:
            await neighbours.report(now)
            told, since = now, time.monotonic()
        await asyncio.sleep(_LOOK_EVERY)
