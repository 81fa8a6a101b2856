"""Who may use the device: a number of places, and a bounded queue of those who wait for one."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from .errors import BusyError, RequestError

__all__ = ["Place", "Places", "Waiting"]

_REMEMBERED = 20
_UNKNOWN_WAIT = 10


@dataclass(frozen=True)
class Waiting:
    """Where somebody stands in the queue (1 is next), and the seconds expected until a place is free, if known."""

    position: int
    seconds: float | None


@dataclass(eq=False)
class Place:
    """A place that is taken. `until` is when it is expected to be free again, if that is known."""

    since: float
    until: float | None = None


@dataclass(eq=False)
class _Waiter:
    place: asyncio.Future[Place]
    tell: Callable[[Waiting], None]
    told: Waiting | None = field(default=None)


class Places:
    """Hands out places in the order asked. For one event loop."""

    def __init__(self, total: int, *, queue: int, clock: Callable[[], float]) -> None:
        self.total = total
        self._limit = queue
        self._clock = clock
        self._taken: list[Place] = []
        self._waiting: deque[_Waiter] = deque()
        self._held: deque[float] = deque(maxlen=_REMEMBERED)

    @property
    def taken(self) -> int:
        """Places in use."""
        return len(self._taken)

    @property
    def waiting(self) -> int:
        """Length of the queue."""
        return len(self._waiting)

    @asynccontextmanager
    async def place(
        self, tell: Callable[[Waiting], None], *, seconds: float | None = None, bounded: bool = True
    ) -> AsyncIterator[Place]:
        """Hold a place; `tell` hears the position whenever it changes while this waits.

        `seconds` is how long the place will be needed, if known. `bounded` is False where callers keep a queue.

        Raises:
            BusyError: the queue is full, and `bounded`.
        """
        place = await self._take(tell, bounded)
        if seconds is not None:
            place.until = place.since + seconds
        try:
            yield place
        finally:
            self._taken.remove(place)
            self._held.append(self._clock() - place.since)
            self._advance()

    def refuse_all(self, error: RequestError) -> None:
        """Send everybody away who waits."""
        while (waiter := self._next_waiter()) is not None:
            waiter.place.set_exception(error)

    def wait_for(self, position: int) -> float | None:
        """Seconds until the `position`-th place from now is free, if that can be told."""
        now = self._clock()
        usual = sum(self._held) / len(self._held) if self._held else None
        ends: list[float] = []
        for place in self._taken:
            end = place.until
            if end is None:
                if usual is None:
                    return None
                end = place.since + usual
            ends.append(max(0.0, end - now))
        ends += [0.0] * (self.total - len(self._taken))
        if position > self.total and usual is None:
            return None
        rounds, index = divmod(position - 1, self.total)
        return sorted(ends)[index] + rounds * (usual or 0.0)

    async def _take(self, tell: Callable[[Waiting], None], bounded: bool) -> Place:
        if len(self._taken) < self.total and not self._waiting:
            return self._occupy()
        if bounded and len(self._waiting) >= self._limit:
            seconds = self.wait_for(len(self._waiting) + 1)
            raise BusyError(
                f"all {self.total} places are taken and {len(self._waiting)} clients wait; try again later",
                retry_after=max(1, math.ceil(_UNKNOWN_WAIT if seconds is None else seconds)),
            )
        waiter = _Waiter(asyncio.get_running_loop().create_future(), tell)
        self._waiting.append(waiter)
        self._tell()
        try:
            return await waiter.place
        except asyncio.CancelledError:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
                self._tell()
            elif (
                not waiter.place.cancelled() and waiter.place.exception() is None
            ):  # given at the moment of leaving
                self._taken.remove(waiter.place.result())
                self._advance()
            raise

    def _occupy(self) -> Place:
        place = Place(self._clock())
        self._taken.append(place)
        return place

    def _advance(self) -> None:
        while len(self._taken) < self.total and (waiter := self._next_waiter()) is not None:
            waiter.place.set_result(self._occupy())
        self._tell()

    def _next_waiter(self) -> _Waiter | None:
        """Take whoever is next from the queue, passing over those who left and whose task has not run since."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.place.cancelled():
                return waiter
        return None

    def _tell(self) -> None:
        for position, waiter in enumerate(self._waiting, 1):
            seconds = self.wait_for(position)
            news = Waiting(position, None if seconds is None else round(seconds, 1))
            if news != waiter.told:
                waiter.told = news
                waiter.tell(news)
