"""Two workers that serve all sessions of a pipeline: one denoises, one decodes.

Sessions take turns by chunk. A session may be at most one chunk ahead of what its consumer asked for, and the
decoding of chunk i overlaps the denoising of chunk i + 1.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from .errors import (
    ChunkTimeoutError,
    ClosedError,
    EngineError,
    InputError,
    SessionCancelledError,
    SessionFailedError,
)
from .rollout import PromptSwitch, Rollout

__all__ = [
    "Chunk",
    "ChunkStarted",
    "ChunkTimes",
    "Lane",
    "Scheduler",
    "SessionStatistics",
    "StreamEndedError",
]


MAX_SWITCHES = 1024
"""Prompt switches that may wait in a session; each holds an embedding."""


class StreamEndedError(Exception):
    """A stream has delivered all its chunks. Streams turn it into the end of the iteration."""


@dataclass(frozen=True, eq=False)
class Chunk:
    """Frames of one chunk and what they cost.

    `frames` is uint8 `[N, H, W, 3]` and belongs to the caller; in a session with `frames="device"` it is a
    `DeviceFrames`. `latency` is the time in seconds from the
    start of the chunk's work (a prompt switch and the last chunk's clean forward included) until its frames were
    there. `denoise` and `decode` are the seconds spent inside the transformer's and the decoder's engines,
    `other` the runtime's own work around them. `label` is that of the prompt the chunk was made with, as given
    to `Pipeline.session` or `Session.set_prompt`. `latent` is what the frames were decoded from, float32
    `[channels, latent frames, h, w]`, in a session with `latents=True`.
    """

    index: int
    frames: NDArray[np.uint8]
    latency: float
    denoise: float
    decode: float
    other: float
    label: str | None = None
    latent: NDArray[np.float32] | None = None

    def __repr__(self) -> str:
        latent = "" if self.latent is None else f", latent {list(self.latent.shape)}"
        shape = list(self.frames.shape)
        return f"<Chunk {self.index}: frames {shape}{latent}, label {self.label!r}, {self.latency:.3f} s>"


@dataclass(frozen=True)
class ChunkTimes:
    """What a chunk cost, without its frames; see `Chunk`."""

    index: int
    frames: int
    latency: float
    denoise: float
    decode: float
    other: float

    @classmethod
    def of(cls, chunk: Chunk) -> ChunkTimes:
        """The times of `chunk`."""
        return cls(chunk.index, len(chunk.frames), chunk.latency, chunk.denoise, chunk.decode, chunk.other)


@dataclass(frozen=True)
class SessionStatistics:
    """Sums over the chunks that a session has computed. Times in seconds; see `Chunk`.

    `delivered` of them went to the consumer, `flushed` were dropped by `Session.flush`.
    """

    chunks: int = 0
    delivered: int = 0
    flushed: int = 0
    frames: int = 0
    latency: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    other: float = 0.0

    def plus(self, chunk: Chunk) -> SessionStatistics:
        """The sums with one more chunk."""
        return replace(
            self,
            chunks=self.chunks + 1,
            frames=self.frames + len(chunk.frames),
            latency=self.latency + chunk.latency,
            denoise=self.denoise + chunk.denoise,
            decode=self.decode + chunk.decode,
            other=self.other + chunk.other,
        )


@dataclass(frozen=True)
class ChunkStarted:
    """Work on a chunk begins. `switched` says whether a new prompt applies from this chunk on."""

    index: int
    label: str | None
    switched: bool


@dataclass(eq=False)
class Lane:
    """What the scheduler knows of one session. Guarded by the scheduler's lock."""

    rollout: Rollout
    on_start: Callable[[ChunkStarted], None] | None = None
    prompt: PromptSwitch | None = None
    """The prompt in force; `None` before the first chunk."""
    asked: int = 0
    """Chunks that the consumer has asked for, received or not."""
    ahead: int = 1
    """Chunks that may be computed before they are asked for."""
    end: int | None = 0
    """Chunk at which the consumer's stream ends; `None` for never."""
    started: int = 0
    delivered: int = 0
    """Chunks that the consumer has received or dropped."""
    flushed: int = 0
    totals: SessionStatistics = SessionStatistics()
    done: deque[Chunk] = field(default_factory=deque)
    switches: list[tuple[int, PromptSwitch]] = field(default_factory=list)
    """Prompt switches not yet applied, with the first chunk each may apply to, in the order they came."""
    active: int = 0
    """Workers that use the rollout at this moment."""
    held: int = 0
    """How many want the lane to stand still."""
    cancelled: bool = False
    closed: bool = False
    error: Exception | None = None
    failed_at: int = 0
    """Chunk that `error` belongs to; those before it are still delivered."""
    listeners: list[Callable[[], None]] = field(default_factory=list)
    """Called once when something changed that a consumer may wait for."""

    @property
    def ready(self) -> bool:
        """Whether the next chunk may start: asked for, or ahead of what was by as much as is allowed."""
        if self.is_over() or self.error is not None or self.held:
            return False
        wanted = self.asked + self.ahead
        return self.started < wanted and (self.end is None or self.started < self.end)

    def is_over(self) -> bool:
        """Whether nobody wants this lane's work any more."""
        return self.cancelled or self.closed

    def take_switch(self) -> PromptSwitch | None:
        """The newest prompt switch that is due for the chunk about to start; it is in force from now on."""
        due = [switch for at, switch in self.switches if at <= self.started]
        self.switches = [(at, switch) for at, switch in self.switches if at > self.started]
        if not due:
            return None
        self.prompt = due[-1]
        return self.prompt

    def prompt_before(self, chunk: int) -> PromptSwitch:
        """The prompt that `chunk` would be made with if nothing more is asked for."""
        due = [switch for at, switch in self.switches if at <= chunk]
        prompt = due[-1] if due else self.prompt
        assert prompt is not None  # a lane begins with a switch for chunk 0
        return prompt


@dataclass(frozen=True)
class _Decoding:
    lane: Lane
    chunk: int
    label: str | None
    begun: float
    denoise: float
    other: float


class Scheduler:
    """Owns the two worker threads and the lock that guards every lane."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._lanes: deque[Lane] = deque()
        self._decodings: deque[_Decoding] = deque()
        self._stopping = False
        self._process = os.getpid()
        self._threads = [
            threading.Thread(target=self._denoise_forever, name="lightforcing-denoise", daemon=True),
            threading.Thread(target=self._decode_forever, name="lightforcing-decode", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def is_forked(self) -> bool:
        """Whether this is a child of the process that has the workers; locks may be held for ever here."""
        return os.getpid() != self._process

    def require_own_process(self) -> None:
        """Refuse to work in a child process.

        Raises:
            EngineError: this is one: fork copies no threads, neither ours nor a library's.
        """
        if self.is_forked:
            raise EngineError(
                f"the pipeline was loaded in process {self._process}, before it forked into {os.getpid()}; load it in "
                "the process that uses it, or start processes with 'spawn'"
            )

    def add(self, lane: Lane) -> None:
        """Serve `lane` from now on."""
        with self._changed:
            self._lanes.append(lane)

    def remove(self, lane: Lane) -> bool:
        """Stop serving `lane`; returns when no worker uses its rollout. False if it was removed before."""
        if self.is_forked:
            return False
        with self._changed:
            lane.closed = True
            lane.done.clear()
            self._notify(lane)
            self._changed.wait_for(lambda: not lane.active)
            if lane not in self._lanes:
                return False
            self._lanes.remove(lane)
            return True

    def cancel(self, lane: Lane) -> None:
        """Stop `lane` at its next forward and wake whoever waits for it."""
        self.require_own_process()
        with self._changed:
            lane.cancelled = True
            lane.done.clear()
            self._notify(lane)

    def switch(self, lane: Lane, switch: PromptSwitch, at: int | None, over: int = 1) -> int:
        """Queue a prompt switch, or a transition over so many chunks; the index of the chunk where it begins.

        Raises:
            InputError: the chunk has started already, or too many switches wait.
        """
        self.require_own_process()
        with self._changed:
            self._raise_if_over(lane)
            if at is not None and at < lane.started:
                raise InputError(
                    f"chunk {at} has already started; the first that can still change is {lane.started}"
                )
            first = lane.started if at is None else at
            start = lane.prompt_before(first).embedding
            # Of switches for one chunk the newest counts; nobody will ask for the others.
            kept = [(due, old) for due, old in lane.switches if due < first or (due > first and not old.step)]
            if len(kept) + over > MAX_SWITCHES:
                raise InputError(
                    f"{len(kept)} prompt switches wait for later chunks and {over} would be added; expected at most "
                    f"{MAX_SWITCHES} in all: set prompts when their chunks are near"
                )
            lane.switches = kept
            for count in range(1, over):
                mixed = start + (switch.embedding - start) * np.float32(count / over)
                lane.switches.append((first + count - 1, replace(switch, embedding=mixed, step=count > 1)))
            lane.switches.append((first + over - 1, replace(switch, step=over > 1)))
            return first

    def flush(self, lane: Lane) -> tuple[int, int]:
        """Drop chunks that have started and were not delivered: how many, and the chunk that comes next."""
        self.require_own_process()
        with self._changed:
            self._raise_if_over(lane)
            dropped = lane.started - lane.delivered
            lane.flushed += dropped
            lane.delivered = lane.started
            lane.done.clear()
            self._notify(lane)
            return dropped, lane.delivered

    @contextlib.contextmanager
    def standing_still(self, lane: Lane) -> Iterator[None]:
        """Let no worker touch `lane` while the block runs; chunks under way are finished first."""
        self.require_own_process()
        with self._changed:
            lane.held += 1
            try:
                self._changed.wait_for(
                    lambda: (
                        not lane.active
                        and (lane.is_over() or all(job.lane is not lane for job in self._decodings))
                    )
                )
                self._raise_if_over(lane)
                if lane.error is not None:
                    raise self._failure(lane) from lane.error
            except BaseException:
                lane.held -= 1
                raise
        try:
            yield
        finally:
            with self._changed:
                lane.held -= 1
                self._changed.notify_all()

    def ask(self, lane: Lane, end: int | None, ahead: int) -> None:
        """Ask for the next chunk of a stream that ends before chunk `end` (`None`: never ends).

        `ahead` more (0 or 1) may be computed meanwhile.
        """
        self.require_own_process()
        with self._changed:
            lane.end = end
            lane.ahead = ahead
            lane.asked = max(lane.asked, lane.delivered + 1)
            self._changed.notify_all()

    def take(self, lane: Lane, end: int | None, listener: Callable[[], None]) -> Chunk | None:
        """The chunk that was asked for, or `None` if it is not there yet.

        `listener` is then called once, from a worker, as soon as it pays to try again. Raises
        `StreamEndedError`, or what ended the lane, if something did; chunks finished before that come first.
        """
        self.require_own_process()
        with self._changed:
            chunk = self._take(lane, end)
            if chunk is None:
                lane.listeners.append(listener)
            return chunk

    def wait(self, lane: Lane, end: int | None, timeout: float | None) -> Chunk:
        """Like `take`, but waits for the chunk, up to `timeout` seconds; then `ChunkTimeoutError`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self.require_own_process()
        with self._changed:
            while (chunk := self._take(lane, end)) is None:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise self.late(lane, timeout)
                self._changed.wait(left)
            return chunk

    def late(self, lane: Lane, timeout: float | None) -> ChunkTimeoutError:
        """The error that says that the next chunk did not come in time."""
        return ChunkTimeoutError(
            f"chunk {lane.delivered} did not come within {timeout:g} s; the session goes on: ask again, or cancel it"
        )

    def statistics(self, lane: Lane) -> SessionStatistics:
        """What the lane has done so far."""
        self.require_own_process()
        with self._changed:
            return replace(lane.totals, delivered=lane.delivered - lane.flushed, flushed=lane.flushed)

    @property
    def alive(self) -> bool:
        """Whether both workers run."""
        return all(thread.is_alive() for thread in self._threads)

    def backlog(self) -> tuple[int, int]:
        """Lanes with a chunk that may start, and latents that wait for the decoder."""
        with self._changed:
            return sum(lane.ready for lane in self._lanes), len(self._decodings)

    def stop(self) -> None:
        """End the workers; they finish the forward they are in."""
        with self._changed:
            self._stopping = True
            for lane in self._lanes:
                lane.closed = True
                lane.done.clear()
                self._notify(lane)
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def owns(self, thread: threading.Thread) -> bool:
        """Whether it is one of the workers."""
        return thread in self._threads

    def _take(self, lane: Lane, end: int | None) -> Chunk | None:
        if end is not None and lane.delivered >= end:
            raise StreamEndedError
        if lane.done:
            lane.delivered += 1
            return lane.done.popleft()
        self._raise_if_over(lane)
        # Another consumer of this lane may have taken what this one asked for, or asked for a shorter stream. Only
        # ever more is asked for here, so that waiting consumers cannot wake each other in turns.
        shorter = lane.end is not None and (end is None or lane.end < end)
        if lane.asked <= lane.delivered or shorter:
            lane.asked = max(lane.asked, lane.delivered + 1)
            lane.end = end if shorter else lane.end
            self._changed.notify_all()
        return None

    def _raise_if_over(self, lane: Lane) -> None:
        if lane.closed:
            raise ClosedError("the session is closed; open another with Pipeline.session()")
        if lane.cancelled:
            raise SessionCancelledError("the session was cancelled; open another with Pipeline.session()")
        if lane.error is not None and lane.delivered >= lane.failed_at:
            raise self._failure(lane) from lane.error

    def _failure(self, lane: Lane) -> SessionFailedError:
        return SessionFailedError(
            f"chunk {lane.failed_at} failed: {lane.error}; this session is over, the pipeline can open others"
        )

    def _notify(self, lane: Lane) -> None:
        listeners, lane.listeners = lane.listeners, []
        for listener in listeners:
            listener()
        self._changed.notify_all()

    def _next_lane(self) -> Lane | None:
        for _ in range(len(self._lanes)):
            lane = self._lanes[0]
            self._lanes.rotate(-1)
            if lane.ready:
                return lane
        return None

    def _denoise_forever(self) -> None:
        while True:
            with self._changed:
                lane = None
                while not self._stopping and (lane := self._next_lane()) is None:
                    self._changed.wait()
                if lane is None or self._stopping:
                    return
                chunk, switch = lane.started, lane.take_switch()
                label = lane.prompt.label if lane.prompt else None
                lane.started += 1
                lane.active += 1
            with self._serving(lane, chunk):
                if lane.on_start is not None:
                    lane.on_start(ChunkStarted(chunk, label, switched=switch is not None and chunk > 0))
                begun = time.perf_counter()
                seconds = lane.rollout.advance(switch, lane.is_over)
                other = time.perf_counter() - begun - seconds
                with self._changed:
                    self._decodings.append(_Decoding(lane, chunk, label, begun, seconds, other))

    def _decode_forever(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._decodings or self._stopping)
                if self._stopping:
                    return
                job = self._decodings.popleft()
                lane = job.lane
                if lane.is_over() or (lane.error is not None and job.chunk > lane.failed_at):
                    continue
                lane.active += 1
            with self._serving(lane, job.chunk):
                begun = time.perf_counter()
                frames, seconds = lane.rollout.decode(job.chunk)
                latent = lane.rollout.latent(job.chunk)
                end = time.perf_counter()
                chunk = Chunk(
                    index=job.chunk,
                    frames=frames,
                    latency=end - job.begun,
                    denoise=job.denoise,
                    decode=seconds,
                    other=job.other + end - begun - seconds,
                    label=job.label,
                    latent=latent,
                )
                with self._changed:
                    if not lane.is_over() and chunk.index >= lane.delivered:  # else it was flushed meanwhile
                        lane.done.append(chunk)
                    lane.totals = lane.totals.plus(chunk)

    @contextlib.contextmanager
    def _serving(self, lane: Lane, chunk: int) -> Iterator[None]:
        """Let go of the lane at the end. An error ends the lane, never the worker."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        with self._changed:
            lane.active -= 1
            if error is not None and (lane.error is None or chunk < lane.failed_at):
                lane.error, lane.failed_at = error, chunk
            self._notify(lane)
