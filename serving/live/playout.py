"""When a client is due its next chunk, and when it has fallen behind. Pure arithmetic on a clock that is passed in.

The client says when it begins to show a chunk. Until then the chunk is queued there, and no other is sent: the client
shows one and holds at most one. A client that says so sooner than the video's rate allows is not believed. One that has
not begun a chunk half a chunk (and half a second) after the following one should have begun is behind, and that
following one is dropped.
"""

from __future__ import annotations

__all__ = ["Playout"]

_GRACE = 0.5
"""Fraction of a chunk that a client may be late before something is dropped."""
_LEAST_GRACE = 0.5
_EARLY = 0.1
"""Fraction of a chunk that a client's clock may be early."""
_SPARE = 1.5
"""Real time must exceed a chunk's latency by this factor for its work to begin only when it is due."""
_PATIENCE = 8
"""Chunks in time after which an engine that was late is trusted again."""


class Playout:
    """The clock of one client's screen."""

    def __init__(self) -> None:
        self._last: int | None = None
        self._begins = 0.0
        """When the last chunk sent begins to show, or began."""
        self._lasts = 0.0
        self._shown = True
        self._heard = 0.0
        self._in_time = 0
        self._eager = True
        self._running = False

    def queued(self, now: float) -> bool:
        """Whether the client holds a chunk that it has not begun to show."""
        return not self._shown or now < self._begins

    @property
    def begins(self) -> float:
        """When the last chunk sent begins to show, or began, as far as is known."""
        return self._begins

    @property
    def eager(self) -> bool:
        """Whether the engine is too slow to begin a chunk only when the one before it begins to show."""
        return self._eager

    def sent(self, chunk: int, seconds: float, now: float) -> float:
        """A chunk that lasts `seconds` is sent; how long the client had nothing to show before it, in seconds."""
        due = self._begins + self._lasts
        stall = max(0.0, now - due) if self._running else 0.0
        self._begins = max(now, due) if self._running else now
        self._last, self._lasts, self._shown = chunk, seconds, False
        if not self._running:
            self._heard = now
        self._running = True
        return stall

    def acknowledged(self, chunk: int, now: float) -> None:
        """The client begins to show a chunk."""
        self._heard = now
        if chunk == self._last and not self._shown:
            self._shown = True
            self._begins = max(now, self._begins - _EARLY * self._lasts)

    def deadline(self, seconds: float) -> float:
        """When a chunk of `seconds`, due after the last one sent, is dropped if that one has not begun to show."""
        return self._begins + self._lasts + max(_GRACE * seconds, _LEAST_GRACE)

    def dropped(self, seconds: float) -> None:
        """A chunk of `seconds` was not sent; the client shows the last one for longer."""
        self._lasts += seconds

    def silent_for(self, now: float) -> float:
        """Seconds since the client last said something while it had something to show; 0 if it has not."""
        return now - self._heard if self._running and not self._shown else 0.0

    def flush(self) -> None:
        """The client shows nothing of what it holds; nothing is due until the next chunk is sent."""
        self._running = False
        self._shown = True
        self._begins = 0.0

    def paused(self, seconds: float, now: float) -> None:
        """The client's screen stood still for so long, until now."""
        self._begins += seconds
        self._heard = now

    def measured(self, latency: float, seconds: float) -> None:
        """A chunk of `seconds` took `latency` seconds from being asked for."""
        if latency * _SPARE > seconds:
            self._eager, self._in_time = True, 0
            return
        self._in_time += 1
        # The first chunk may decide; afterwards one that was late has to be made up for.
        if self._eager and (self._in_time >= _PATIENCE or self._last is None):
            self._eager = False
