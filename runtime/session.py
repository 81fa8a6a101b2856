"""A session: one rollout of one consumer, delivered as a stream of chunks."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .bundle import Manifest, Recache
from .errors import InputError
from .rollout import PromptSwitch, chunk_first_frame, chunk_pixel_frames
from .saved.file import bundle_digest
from .saved.lanes import capture
from .scheduler import Chunk, Lane, Scheduler, SessionStatistics, StreamEndedError

__all__ = ["ChunkStream", "Session", "SessionState", "chunks_for_seconds"]

SessionState = Literal["open", "cancelled", "failed", "closed"]

_FRAME_TOLERANCE = 1e-6

LONGEST_STREAM = 1_000_000
"""Seconds of video that a stream may be asked for, eleven days; whoever asks for more has made a mistake."""

_MOST_CHUNKS = 1 << 24
"""Chunks that a stream may be asked for, for the same reason."""


def chunks_for_seconds(manifest: Manifest, seconds: float, first: int = 0) -> int:
    """Whole chunks that cover `seconds` of video, if the next chunk is number `first`.

    Raises:
        InputError: `seconds` is no positive number of at most `LONGEST_STREAM`.
    """
    is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if not is_number or not 0 < seconds <= LONGEST_STREAM:
        raise InputError(
            f"seconds is {seconds!r}; expected a positive number of at most {LONGEST_STREAM:,} (a stream without a "
            "length has no end)"
        )
    # The tolerance keeps, say, 0.1 * 30 frames from rounding up to four.
    frames = math.ceil(seconds * manifest.model.fps - _FRAME_TOLERANCE) - chunk_pixel_frames(manifest, first)
    return 1 + max(0, -(-frames // chunk_pixel_frames(manifest, first + 1)))


class ChunkStream:
    """Iterates over the next chunks of a session, in a `for` or an `async for` loop.

    `chunks` and `frames` are the totals of the stream, or `None` if it is endless. Work starts with the
    first iteration. Leaving a loop early keeps the session usable: the next stream goes on where it stopped.

    `ahead` (1 or 0) says how many chunks may be computed before they are asked for, and may be changed between
    iterations: 0 makes a new prompt apply one chunk earlier, 1 lets the engine work while the consumer does.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        lane: Lane,
        manifest: Manifest,
        chunks: int | None,
        *,
        timeout: float | None = None,
        ahead: Literal[0, 1] = 1,
        session: Session | None = None,
    ) -> None:
        """`session` is kept alive, and with it the pipeline, while the stream is."""
        self.ahead = ahead
        self._session = session
        self._timeout = timeout
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
            self._scheduler.ask(self._lane, self._end, self.ahead)
            return self._scheduler.wait(self._lane, self._end, self._timeout)
        except StreamEndedError:
            raise StopIteration from None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        self._scheduler.ask(self._lane, self._end, self.ahead)
        loop = asyncio.get_running_loop()
        deadline = None if self._timeout is None else loop.time() + self._timeout
        while True:
            # A chunk is only ever taken without waiting, so a task cancelled while it waits loses nothing.
            news, listener = _listener()
            try:
                chunk = self._scheduler.take(self._lane, self._end, listener)
            except StreamEndedError:
                raise StopAsyncIteration from None
            if chunk is not None:
                return chunk
            try:
                async with asyncio.timeout_at(deadline):
                    await news
            except TimeoutError:
                raise self._scheduler.late(self._lane, self._timeout) from None


class Session:
    """One rollout. Created by `Pipeline.session`; close it, or use it in a `with` statement. One that is dropped
    gives its place to the next session that wants one.

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
        forgotten: deque[Callable[[], None]],
    ) -> None:
        """What closes the session is put into `forgotten` when it is dropped without being closed."""
        self._scheduler = scheduler
        self._lane = lane
        self._manifest = manifest
        self._embed = embed
        self._release = release
        # The collector may run anywhere, also where the scheduler's lock is held: nothing may wait there.
        self._finalizer = weakref.finalize(self, forgotten.append, partial(_close, scheduler, lane, release))
        self._finalizer.atexit = False

    def stream(
        self,
        *,
        seconds: float | None = None,
        chunks: int | None = None,
        timeout: float | None = None,
        ahead: Literal[0, 1] = 1,
    ) -> ChunkStream:
        """The next chunks of the rollout: enough whole ones for `seconds`, or `chunks`, or without end.

        An iteration that takes longer than `timeout` seconds raises `ChunkTimeoutError`; the session goes on,
        and the stream may be asked again. For `ahead` see `ChunkStream`.

        Raises:
            InputError: both lengths are given, or an argument is out of range.
        """
        if seconds is not None and chunks is not None:
            raise InputError("both seconds and chunks are given; expected one of them, or neither for no end")
        if seconds is not None:
            chunks = chunks_for_seconds(self._manifest, seconds, self._lane.delivered)
        elif chunks is not None and (
            isinstance(chunks, bool) or not isinstance(chunks, int) or not 1 <= chunks <= _MOST_CHUNKS
        ):
            raise InputError(f"chunks is {chunks!r}; expected a whole number from 1 to {_MOST_CHUNKS:,}")
        if timeout is not None and not timeout > 0:
            raise InputError(
                f"timeout is {timeout!r}; expected seconds, more than 0, or None to wait for ever"
            )
        if ahead not in (0, 1):
            raise InputError(f"ahead is {ahead!r}; expected 0 or 1")
        return ChunkStream(
            self._scheduler, self._lane, self._manifest, chunks, timeout=timeout, ahead=ahead, session=self
        )

    def set_prompt(
        self,
        prompt: str | None = None,
        *,
        embedding: ArrayLike | None = None,
        recache: Recache | None = None,
        at: int | None = None,
        over: int = 1,
        label: str | None = None,
    ) -> int:
        """Switch the prompt, or a prompt embedding `[text_len, dim]`; the index of the chunk where it applies.

        It applies to the next chunk that has not started, or to chunk `at` if that is later; of several that
        fall due together the last one counts. The prompt is encoded before this returns; recomputing cached keys
        and values happens when the chunk starts and is part of its latency.

        `recache` says what happens to cached frames: they are recomputed with the new prompt chunk by chunk, all but
        the sinks (`"window"`) or `"all"`; they stay (`"none"`); all that attention sees is recomputed in one
        forward without a mask (`"joint"`, for bundles that are built for it); all but the sinks and the latest are
        forgotten (`"flush"`), or besides, the scene changes (`"cut"`). `None` is what the bundle says.

        `over` makes a transition of it: over so many chunks the embedding moves in equal steps from the prompt
        before to this one, each step recomputing what `recache` says. A newer switch ends a transition. `label`
        comes back as `Chunk.label` of the chunks made with this prompt.

        Raises:
            InputError: an argument is not usable, or comes too late.
        """
        recache = self._manifest.cache.recache if recache is None else recache
        known = self._manifest.recache_modes
        if recache not in known:
            raise InputError(f"recache is {recache!r}; expected one of {', '.join(known)} with this bundle")
        if at is not None and (isinstance(at, bool) or not isinstance(at, int) or at < 0):
            raise InputError(f"at is {at!r}; expected the index of a chunk, or None for the next one")
        if isinstance(over, bool) or not isinstance(over, int) or over < 1:
            raise InputError(f"over is {over!r}; expected a number of chunks, 1 or more")
        if over > 1 and recache == "cut":
            raise InputError(
                f"a cut is at one chunk, and over is {over}; leave it out, or use recache 'flush'"
            )
        switch = PromptSwitch(self._embed(prompt, embedding), recache, label)
        return self._scheduler.switch(self._lane, switch, at, over)

    def flush(self) -> tuple[int, int]:
        """Drop the chunks that are finished or under way and were not delivered: how many, and which comes next.

        The rollout goes on behind what was dropped, so a new prompt set just before shows in the very next chunk.
        They count towards a stream's length.
        """
        return self._scheduler.flush(self._lane)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the session's state to a file, from which `Pipeline.resume` goes on with the same bits.

        Chunks under way are finished first. The session itself goes on too. The file is as large as what the pipeline
        keeps for a session (`pipe.memory.session_bytes`), and holds finished chunks that were not delivered.

        Raises:
            InputError: the session's frames stay on the device, its noise is the caller's, it has not begun with what
                it starts from, or the file cannot be written.
        """
        lane = self._lane
        if lane.rollout.has_own_noise:
            raise InputError("the session's noise is the caller's own; only sessions with a seed are saved")
        if lane.rollout.keeps_frames_on_device:
            raise InputError(
                "the session's frames stay on the device; only sessions with frames='host' are saved"
            )
        if not Path(path).parent.is_dir():
            raise InputError(f"folder {str(Path(path).parent)!r} does not exist; create it first")
        with self._scheduler.standing_still(lane):
            if lane.started < lane.rollout.given:
                raise InputError(
                    "the session has not taken in the frames that it starts from; take its first chunk, then save it"
                )
            saved = capture(lane, bundle_digest(self._manifest))
        saved.write(path)

    def first_frame(self, chunk: int) -> int:
        """Number of the first pixel frame of a chunk, from the start of the rollout."""
        return chunk_first_frame(self._manifest, chunk)

    @property
    def given(self) -> int:
        """Chunks at the beginning that are frames the session was started from; they are not delivered."""
        return self._lane.rollout.given

    @property
    def index(self) -> int:
        """The chunk that starts next: the first that a new prompt can still change."""
        return self._lane.started

    @property
    def state(self) -> SessionState:
        """`"open"`, or what ended the session."""
        lane = self._lane
        if lane.closed:
            return "closed"
        if lane.cancelled:
            return "cancelled"
        return "open" if lane.error is None else "failed"

    @property
    def statistics(self) -> SessionStatistics:
        """What the session has done so far."""
        return self._scheduler.statistics(self._lane)

    def cancel(self) -> None:
        """Stop at the next forward. Whoever waits for a chunk gets `SessionCancelledError`."""
        self._scheduler.cancel(self._lane)

    def close(self) -> None:
        """End the session and give its slots back; waits for the forward that is running. May be called twice."""
        self._finalizer.detach()
        _close(self._scheduler, self._lane, self._release)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _close(scheduler: Scheduler, lane: Lane, release: Callable[[], None]) -> None:
    if scheduler.remove(lane):
        release()


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
