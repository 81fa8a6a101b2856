"""A session: one rollout of one consumer, delivered as a stream of chunks."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import InputError
from .manifest import Manifest
from .rollout import RECACHE_MODES, PromptSwitch, Recache, chunk_pixel_frames
from .scheduler import Chunk, Lane, Scheduler, StreamEndedError

__all__ = ["ChunkStream", "Session", "chunks_for_seconds"]

_FRAME_TOLERANCE = 1e-6


def chunks_for_seconds(manifest: Manifest, seconds: float, first: int = 0) -> int:
    """Whole chunks that cover ``seconds`` of video, if the next chunk is number ``first``.

    Raises :class:`InputError` unless ``seconds`` is a positive finite number.
    """
    if not isinstance(seconds, (int, float)) or not math.isfinite(seconds) or seconds <= 0:
        raise InputError(f"seconds is {seconds!r}; expected a positive number")
    # The tolerance keeps, say, 0.1 * 30 frames from rounding up to four.
    frames = math.ceil(seconds * manifest.model.fps - _FRAME_TOLERANCE) - chunk_pixel_frames(manifest, first)
    return 1 + max(0, -(-frames // chunk_pixel_frames(manifest, first + 1)))


class ChunkStream:
    """Iterates over the next chunks of a session, in a ``for`` or an ``async for`` loop.

    ``chunks`` and ``frames`` are the totals of the stream, or ``None`` if it is endless. Work starts with the
    first iteration. Leaving a loop early keeps the session usable: the next stream goes on where it stopped.
    """

    def __init__(self, scheduler: Scheduler, lane: Lane, manifest: Manifest, chunks: int | None) -> None:
        self._scheduler = scheduler
        self._lane = lane
        first = lane.delivered
        self._end = None if chunks is None else first + chunks
        self.chunks = chunks
        self.frames = (
            None
            if chunks is None
            else chunk_pixel_frames(manifest, first) + (chunks - 1) * chunk_pixel_frames(manifest, first + 1)
        )

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        try:
            self._scheduler.ask(self._lane, self._end)
            return self._scheduler.wait(self._lane, self._end)
        except StreamEndedError:
            raise StopIteration from None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        self._scheduler.ask(self._lane, self._end)
        while True:
            # A chunk is only ever taken without waiting, so a task cancelled while it waits loses nothing.
            news, listener = _listener()
            try:
                chunk = self._scheduler.take(self._lane, self._end, listener)
            except StreamEndedError:
                raise StopAsyncIteration from None
            if chunk is not None:
                return chunk
            await news


class Session:
    """One rollout. Created by :meth:`Pipeline.session`; close it, or use it in a ``with`` statement.

    All methods may be called from any thread, also while another iterates over the stream.
    """

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        lane: Lane,
        manifest: Manifest,
        embed: Callable[[str | None, ArrayLike | None], NDArray[np.float32]],
        release: Callable[[], None],
    ) -> None:
        self._scheduler = scheduler
        self._lane = lane
        self._manifest = manifest
        self._embed = embed
        self._release = release

    def stream(self, *, seconds: float | None = None, chunks: int | None = None) -> ChunkStream:
        """The next chunks of the rollout: enough whole ones for ``seconds``, or ``chunks``, or without end.

        Raises :class:`InputError` if both are given or one is out of range.
        """
        if seconds is not None and chunks is not None:
            raise InputError("both seconds and chunks are given; expected one of them, or neither for no end")
        if seconds is not None:
            chunks = chunks_for_seconds(self._manifest, seconds, self._lane.delivered)
        elif chunks is not None and (isinstance(chunks, bool) or not isinstance(chunks, int) or chunks < 1):
            raise InputError(f"chunks is {chunks!r}; expected a whole number, 1 or more")
        return ChunkStream(self._scheduler, self._lane, self._manifest, chunks)

    def set_prompt(
        self,
        prompt: str | None = None,
        *,
        embedding: ArrayLike | None = None,
        recache: Recache = "window",
        at: int | None = None,
    ) -> int:
        """Switch the prompt, or a prompt embedding ``[text_len, dim]``; the index of the chunk where it applies.

        It applies to the next chunk that has not started, or to chunk ``at`` if that is later; of several that
        fall due together the last one counts. The prompt is encoded before this returns; recomputing cached keys
        and values happens when the chunk starts and is part of its latency.

        ``recache`` says which cached frames are recomputed with the new prompt: ``"window"`` all but the sinks,
        ``"all"``, or ``"none"``.
        """
        if recache not in RECACHE_MODES:
            raise InputError(f"recache is {recache!r}; expected one of {', '.join(RECACHE_MODES)}")
        if at is not None and (isinstance(at, bool) or not isinstance(at, int) or at < 0):
            raise InputError(f"at is {at!r}; expected the index of a chunk, or None for the next one")
        return self._scheduler.switch(self._lane, PromptSwitch(self._embed(prompt, embedding), recache), at)

    def cancel(self) -> None:
        """Stop at the next forward. Whoever waits for a chunk gets :class:`SessionCancelledError`."""
        self._scheduler.cancel(self._lane)

    def close(self) -> None:
        """End the session and give its slots back; waits for the forward that is running. May be called twice."""
        if self._scheduler.remove(self._lane):
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _listener() -> tuple[asyncio.Future[None], Callable[[], None]]:
    """A future of the running loop, and a thread-safe callable that completes it."""
    loop = asyncio.get_running_loop()
    news: asyncio.Future[None] = loop.create_future()

    def complete() -> None:
        if not news.done():
            news.set_result(None)

    def notify() -> None:
        with contextlib.suppress(RuntimeError):  # the loop may have been closed since
            loop.call_soon_threadsafe(complete)

    return news, notify
