"""A live session: a rollout shown while it is computed, and controlled while it is shown. Knows no transport."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime import (
    Chunk,
    ChunkTimeoutError,
    ClosedError,
    InputError,
    LightForcingError,
    Pipeline,
    Session,
    SessionCancelledError,
)
from serving.errors import RequestError
from serving.logs import SessionLog
from serving.metrics import Metrics
from serving.settings import Limits
from serving.tracing import span, trace_chunk

from .playout import Playout
from .protocol import Control, SetPrompt, Start, receipt

__all__ = ["EndReason", "LiveSession", "Outlet", "Picture"]

EndReason = Literal["completed", "cancelled", "failed", "shutdown", "silent", "idle", "gone"]


@dataclass(frozen=True, eq=False)
class Picture:
    """The frames of a chunk, uint8 `[N, H, W, 3]`, for an outlet. `keyframe`: the first must stand on its own.

    `gap`: chunks before it were left out. `frame` is the number of the first frame in the session.
    """

    chunk: int
    frame: int
    frames: NDArray[np.uint8]
    keyframe: bool
    gap: bool


class Outlet(Protocol):
    """Where a live session's events and pictures go."""

    async def event(self, message: dict[str, Any]) -> None:
        """Send a message."""

    async def picture(self, picture: Picture, describe: Callable[[float], dict[str, Any]]) -> float:
        """Encode and send frames, after the event that `describe` makes of the encoder's seconds; returns those."""


class LiveSession:
    """One rollout for one client. `run` is its life; the other methods may be called meanwhile."""

    def __init__(
        self,
        pipeline: Pipeline,
        start: Start,
        outlet: Outlet,
        *,
        limits: Limits,
        metrics: Metrics,
        log: SessionLog,
    ) -> None:
        self._pipeline = pipeline
        self._start = start
        self._outlet = outlet
        self._limits = limits
        self._metrics = metrics
        self._log = log
        self._fps = pipeline.manifest.model.fps
        self._playout = Playout()
        self._news = asyncio.Event()
        self._delivering = asyncio.Lock()
        """Held while a chunk is sent, so that a receipt never speaks of one that is half sent."""
        self._session: Session | None = None
        self._switches: dict[str, tuple[str | int | None, float]] = {}
        """Prompt switches not yet shown, by label: the client's id and when it was asked for."""
        self._labels = 0
        self._shown_label: str | None = None
        self._next = 0
        """The first chunk that has been neither sent nor dropped."""
        self._paused_at: float | None = None
        self._keyframe = True
        self._gap = False
        self._dropped_frames = 0
        self._end: tuple[EndReason, str] | None = None
        self._begun = time.monotonic()
        self._last_arrival: float | None = None

    async def run(self) -> tuple[EndReason, str]:
        """Open the session, stream until something ends it, close it: why, and a sentence for people.

        Not to be cancelled: `end` ends it.

        Raises:
            RequestError: it cannot be opened.
        """
        await self._open()
        try:
            await self._stream()
        except SessionCancelledError:
            pass  # the reason was noted by whoever cancelled
        except ClosedError:
            self.end("shutdown", "the server is stopping")
        except ChunkTimeoutError as error:
            self._log.error("a chunk did not come in time", error=str(error))
            self.end("failed", f"chunk {self._next} did not come within {self._limits.chunk_timeout:g} s")
        except LightForcingError as error:
            self._log.error("session failed", error=repr(error), cause=repr(error.__cause__))
            self.end("failed", f"chunk {self._next} could not be made; other sessions are not affected")
        finally:
            session = self._session
            assert session is not None
            session.cancel()
            await asyncio.to_thread(session.close)
        return self._end or ("cancelled", "the session was cancelled")

    def end(self, reason: EndReason, message: str) -> None:
        """End the session soon; the first reason counts. Callable before it has been opened."""
        self._end = self._end or (reason, message)
        if self._session is not None:
            self._session.cancel()
        self._news.set()

    def acknowledged(self, chunk: int) -> None:
        """The client begins to show a chunk."""
        self._playout.acknowledged(chunk, time.monotonic())
        self._news.set()

    async def control(self, message: Control) -> dict[str, Any]:
        """Do what a message asks for; its receipt.

        Raises:
            RequestError: it is refused.
        """
        session = self._session
        if session is None or self._end is not None:
            raise RequestError("no_session", "no session is running; send start first", status=409)
        begun = time.monotonic()
        more: dict[str, Any] = {}
        chunk = self._next
        if message.type == "set_prompt":
            chunk = await self._set_prompt(session, message)
            self._log.prompt("prompt switched", message.prompt, chunk=chunk)
        elif message.type == "cancel":
            self.end("cancelled", "cancelled by the client")
        else:
            async with self._delivering:
                chunk, more = self._steer(session, message.type)
        self._news.set()
        self._metrics.receipt_seconds.observe(time.monotonic() - begun)
        return receipt(message, chunk=chunk, time=session.first_frame(chunk) / self._fps, **more)

    def _steer(
        self, session: Session, action: Literal["pause", "resume", "flush", "keyframe"]
    ) -> tuple[int, dict[str, Any]]:
        """Do what concerns the chunks not yet sent: the first of them, and what else the receipt says."""
        if action == "flush":
            return self._flush(session)
        if action == "keyframe":
            self._keyframe = True
        elif action == "resume":
            self._resume()
        elif self._paused_at is None:
            self._paused_at = time.monotonic()
        return self._next, {}

    async def _open(self) -> None:
        start = self._start
        check_prompts([start.prompt, *(entry.prompt for entry in start.schedule)], self._limits)
        try:
            with span("condition", session=self._log.session):
                session = await asyncio.to_thread(
                    self._pipeline.session, start.prompt, seed=start.seed, label="0"
                )
        except InputError as error:
            raise RequestError("bad_input", str(error)) from None
        self._session = session
        try:
            for entry in start.schedule:
                await asyncio.to_thread(
                    session.set_prompt,
                    entry.prompt,
                    at=entry.at,
                    over=entry.over,
                    label=self._label(start.id),
                )
        except InputError as error:
            await asyncio.to_thread(session.close)
            raise RequestError("bad_input", str(error)) from None
        self._shown_label = "0"
        self._log.prompt("session started", start.prompt, seed=start.seed, seconds=start.seconds)

    async def _set_prompt(self, session: Session, message: SetPrompt) -> int:
        check_prompts([message.prompt], self._limits)
        label = self._label(message.id)
        try:
            with span("condition", session=self._log.session):
                return await asyncio.to_thread(
                    session.set_prompt,
                    message.prompt,
                    recache=message.recache,
                    at=message.at,
                    over=message.over,
                    label=label,
                )
        except LightForcingError as error:
            del self._switches[label]
            if isinstance(error, InputError):
                raise RequestError("bad_input", str(error)) from None
            raise RequestError("no_session", "the session is over", status=409) from None

    def _label(self, identity: str | int | None) -> str:
        self._labels += 1
        self._switches[str(self._labels)] = (identity, time.monotonic())
        return str(self._labels)

    def _resume(self) -> None:
        if self._paused_at is not None:
            now = time.monotonic()
            self._playout.paused(now - self._paused_at, now)
            self._paused_at = None
            self._keyframe = True
            self._last_arrival = None

    def _flush(self, session: Session) -> tuple[int, dict[str, Any]]:
        """Drop what the engine has ready, and what waits here to be sent; the client drops what it holds."""
        before = self._next
        try:
            _, chunk = session.flush()
        except LightForcingError:
            raise RequestError("no_session", "the session is over", status=409) from None
        frames = session.first_frame(chunk) - session.first_frame(before)
        self._next = chunk
        self._keyframe = self._gap = True
        self._dropped_frames += frames
        self._playout.flush()
        self._metrics.dropped_frames.labels("flush").inc(frames)
        return chunk, {"dropped_chunks": chunk - before, "dropped_frames": frames}

    async def _stream(self) -> None:
        session = self._session
        assert session is not None
        await self._outlet.event(
            receipt(self._start, chunk=0, time=0.0, seed=self._start.seed, session=self._log.session)
        )
        stream = session.stream(seconds=self._start.seconds, timeout=self._limits.chunk_timeout)
        while True:
            await self._wait(lambda: self._paused_at is None)
            if not self._playout.eager:
                await self._until_room(self._next)
            stream.ahead = 1 if self._playout.eager else 0
            asked = time.monotonic()
            try:
                chunk = await anext(stream)
            except StopAsyncIteration:
                self.end("completed", "the session has reached its length")
                return
            seconds = len(chunk.frames) / self._fps
            self._playout.measured(max(chunk.latency, time.monotonic() - asked), seconds)
            trace_chunk(chunk, self._log.session)
            self._metrics.computed(chunk, seconds)
            await self._serve(chunk, seconds)

    async def _serve(self, chunk: Chunk, seconds: float) -> None:
        """Send a chunk when it is due, or drop it."""
        while True:
            room = await self._until_room(chunk.index)
            async with self._delivering:
                if self._paused_at is not None:
                    continue
                if chunk.index >= self._next:  # else it was on its way when the client wanted no more of it
                    await (self._deliver(chunk, seconds) if room else self._drop(chunk, seconds))
                return

    async def _until_room(self, chunk: int) -> bool:
        """Wait until the client holds no chunk that it has not begun to show; False if it is too late for `chunk`."""
        session = self._session
        assert session is not None
        seconds = (session.first_frame(chunk + 1) - session.first_frame(chunk)) / self._fps
        await self._wait(lambda: self._paused_at is None)
        deadline = self._playout.deadline(seconds)
        while self._playout.queued(now := time.monotonic()):
            until = begins if now < (begins := self._playout.begins) else deadline
            if await self._wait(
                lambda: not self._playout.queued(time.monotonic()) or self._paused_at is not None, until=until
            ):
                await self._wait(lambda: self._paused_at is None)
                deadline = self._playout.deadline(seconds)
                continue
            if until < deadline:
                continue
            silent = self._playout.silent_for(time.monotonic())
            if silent > self._limits.ack_timeout:
                self.end("silent", f"the client has shown nothing for {silent:.1f} s")
                raise SessionCancelledError("the client is silent")
            return False
        return True

    async def _deliver(self, chunk: Chunk, seconds: float) -> None:
        session = self._session
        assert session is not None
        frame = session.first_frame(chunk.index)
        picture = Picture(chunk.index, frame, chunk.frames, self._keyframe, self._gap)
        self._keyframe = self._gap = False
        switched = chunk.label != self._shown_label
        stall = 0.0

        def describe(encode: float) -> dict[str, Any]:
            nonlocal stall  # from now on the client may say that it shows the chunk
            stall = self._playout.sent(chunk.index, seconds, time.monotonic())
            return self._describe(chunk, frame, encode, switched)

        try:
            async with asyncio.timeout(self._limits.ack_timeout):
                encode = await self._outlet.picture(picture, describe)
        except TimeoutError:
            self.end("silent", f"the client takes nothing for {self._limits.ack_timeout:g} s")
            raise SessionCancelledError("the client is silent") from None
        now = time.monotonic()
        self._next = chunk.index + 1
        self._metrics.sent(chunk, encode, stall)
        if self._last_arrival is None:
            if chunk.index == 0:
                self._metrics.first_chunk_seconds.observe(now - self._begun)
        else:
            self._metrics.chunk_interval_seconds.observe(now - self._last_arrival)
        self._last_arrival = now
        if switched:
            await self._applied(chunk, frame, now)

    def _describe(self, chunk: Chunk, frame: int, encode: float, switched: bool) -> dict[str, Any]:
        return {
            "type": "chunk",
            "chunk": chunk.index,
            "frame": frame,
            "frames": len(chunk.frames),
            "time": round(frame / self._fps, 6),
            "latency": round(chunk.latency, 6),
            "denoise": round(chunk.denoise, 6),
            "decode": round(chunk.decode, 6),
            "other": round(chunk.other, 6),
            "encode": round(encode, 6),
            "switched": switched,
        }

    async def _applied(self, chunk: Chunk, frame: int, now: float) -> None:
        """Tell which request the picture now follows; requests that a later one replaced are not heard of again."""
        self._shown_label = chunk.label
        entry = self._switches.get(chunk.label or "")
        for label in [label for label in self._switches if int(label) <= int(chunk.label or 0)]:
            del self._switches[label]
        if entry is not None:
            identity, asked = entry
            self._metrics.switch_seconds.observe(now - asked)
            await self._outlet.event(
                {
                    "type": "applied",
                    "id": identity,
                    "chunk": chunk.index,
                    "time": round(frame / self._fps, 6),
                    "after": round(now - asked, 6),
                }
            )

    async def _drop(self, chunk: Chunk, seconds: float) -> None:
        self._next = chunk.index + 1
        self._keyframe = self._gap = True
        self._dropped_frames += len(chunk.frames)
        self._playout.dropped(seconds)
        self._metrics.dropped_frames.labels("slow").inc(len(chunk.frames))
        await self._outlet.event(
            {
                "type": "dropped",
                "chunk": chunk.index,
                "frames": len(chunk.frames),
                "total_frames": self._dropped_frames,
                "reason": "slow",
            }
        )

    async def _wait(self, condition: Callable[[], bool], *, until: float | None = None) -> bool:
        """Wait for a condition, or until a time; raises if the session ended or stood still for too long."""
        limit = time.monotonic() + self._limits.idle_timeout
        deadline = limit if until is None else min(until, limit)
        while True:
            if self._end is not None:
                raise SessionCancelledError("the session has ended")
            if condition():
                return True
            self._news.clear()
            left = deadline - time.monotonic()
            if left <= 0:
                break
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._news.wait()
        if until is None or limit < until:
            self.end("idle", f"nothing happened for {self._limits.idle_timeout:g} s")
            raise SessionCancelledError("the session was idle")
        return False


def check_prompts(prompts: Iterable[str], limits: Limits) -> None:
    """Hold prompts against the server's limits.

    Raises:
        RequestError: a prompt or the schedule is too long.
    """
    for count, prompt in enumerate(prompts):
        if len(prompt) > limits.prompt_chars:
            raise RequestError(
                "prompt_too_long",
                f"the prompt has {len(prompt)} characters; at most {limits.prompt_chars} are taken",
            )
        if count > limits.schedule_prompts:
            raise RequestError(
                "schedule_too_long", f"the schedule has more than {limits.schedule_prompts} prompts"
            )
