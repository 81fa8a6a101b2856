"""One client and its sessions, whatever carries its messages."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from starlette.websockets import WebSocketDisconnect, WebSocketState

from serving.errors import BusyError, RequestError
from serving.live.encoder import h264_codec
from serving.live.protocol import PROTOCOL, Ack, Control, MediaFrame, Start, parse_client_message, refusal
from serving.live.session import EndReason, LiveSession, Outlet
from serving.logs import SessionLog
from serving.places import Waiting
from serving.security import RateLimit
from serving.service import Service

from .outlet import EncodingOutlet

__all__ = ["ClosableOutlet", "Connection", "NewOutlet", "Socket", "connected"]

_WAITING_CONTROLS = 16
_NORMAL, _POLICY, _RESTART, _TRY_LATER = 1000, 1008, 1012, 1013


class Socket(Protocol):
    """What a connection needs of its carrier; Starlette's WebSocket is one."""

    application_state: WebSocketState

    async def receive(self) -> Any:
        """The next message, as ASGI describes it."""

    async def send_json(self, data: Any) -> None:
        """Send a message."""

    async def send_bytes(self, data: bytes) -> None:
        """Send a picture."""

    async def close(self, code: int = 1000, reason: str | None = None) -> None:
        """Say good-bye."""


class ClosableOutlet(Outlet, Protocol):
    """An outlet that holds something."""

    def close(self) -> None:
        """Let go of it."""


NewOutlet = Callable[["Connection", Start, str], ClosableOutlet]
"""Makes the outlet of a session of a connection; the last argument is the session's id."""


@contextmanager
def connected(service: Service, client: str) -> Iterator[None]:
    """Count a connection of a client's address.

    Raises:
        RequestError: it has too many.
    """
    limit = service.settings.limits.sessions_per_client
    if service.connections.get(client, 0) >= limit:
        service.metrics.refused.labels("too_many_connections").inc()
        raise RequestError(
            "too_many_connections", f"at most {limit} connections are taken from one address", status=429
        )
    service.connections[client] = service.connections.get(client, 0) + 1
    try:
        yield
    finally:
        service.connections[client] -= 1
        if not service.connections[client]:
            del service.connections[client]


class Connection:
    """One client. Reads its messages; a task of its own lives through each session that it asks for."""

    def __init__(self, socket: Socket, service: Service, new_outlet: NewOutlet | None = None) -> None:
        """`new_outlet` makes where a session's pictures go; by default they go over the socket, encoded."""
        self._socket = socket
        self._new_outlet = new_outlet or self._encoding_outlet
        self._service = service
        self._limits = service.settings.limits
        self._rate = RateLimit(self._limits.requests_per_second, self._limits.request_burst, time.monotonic)
        self._sending = asyncio.Lock()
        self._posts: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None
        """The session, from waiting for a place to its end."""
        self._live: LiveSession | None = None
        """The session, once it has a place."""
        self._controls: asyncio.Queue[Control] = asyncio.Queue(_WAITING_CONTROLS)
        self._bad = 0

    async def serve(self) -> None:
        """Read messages until the client leaves or is sent away."""
        controls = asyncio.create_task(self._serve_controls())
        try:
            await self.event(self._hello())
            while True:
                if (message := await self._receive()) is not None:
                    await self._handle(message)
        except RequestError as error:  # not ready, or about to stop
            await self.event({"type": "error", "code": error.code, "message": str(error)})
            await self._close(_TRY_LATER, str(error))
        except WebSocketDisconnect:
            pass
        finally:
            await self._leave()
            for task in (controls, *self._posts):
                task.cancel()
            await asyncio.gather(controls, *self._posts, return_exceptions=True)

    async def event(self, message: dict[str, Any]) -> None:
        """Send a message. Nothing happens if the client is gone: reading finds that out."""
        with suppress(RuntimeError, WebSocketDisconnect, OSError):
            async with self._sending:
                await self._socket.send_json(message)

    async def media(self, frames: list[MediaFrame]) -> None:
        """Send pictures, likewise."""
        with suppress(RuntimeError, WebSocketDisconnect, OSError):
            async with self._sending:
                for frame in frames:
                    await self._socket.send_bytes(frame.to_bytes())

    def _hello(self) -> dict[str, Any]:
        service = self._service
        limits, model = self._limits, service.manifest.model
        return {
            "type": "hello",
            "protocol": PROTOCOL,
            "bundle": service.manifest.name,
            "width": model.video_width,
            "height": model.video_height,
            "fps": model.fps,
            "h264_codec": h264_codec(service.shape)[1],
            "places": service.places.total,
            "limits": {
                "message_bytes": limits.message_bytes,
                "prompt_chars": limits.prompt_chars,
                "seconds": limits.seconds,
                "ack_timeout": limits.ack_timeout,
            },
        }

    async def _receive(self) -> Start | Control | Ack | None:
        """The next message that makes sense; `None` for one that does not."""
        idle = self._task is None or self._task.done()
        try:
            async with asyncio.timeout(self._limits.idle_timeout if idle else None):
                received = await self._socket.receive()
        except TimeoutError:
            await self._close(_NORMAL, "nothing happened for too long")
            raise WebSocketDisconnect from None
        if received["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(received.get("code", 1005))
        try:
            return self._parse(received.get("text"))
        except RequestError as error:
            self._bad += 1
            self._service.metrics.refused.labels(error.code).inc()
            await self.event({"type": "error", "code": error.code, "message": str(error)})
            if self._bad >= self._limits.bad_messages:
                await self._close(_POLICY, "too many messages that cannot be served")
                raise WebSocketDisconnect from None
            return None

    def _parse(self, text: str | None) -> Start | Control | Ack:
        if not self._rate.allows(""):
            raise RequestError("too_many_messages", "messages come too fast; this one was left out")
        if text is None:
            raise RequestError("bad_message", "expected a JSON text message, found a binary one")
        if len(text) > self._limits.message_bytes:
            raise RequestError("too_large", f"a message has at most {self._limits.message_bytes} bytes")
        return parse_client_message(text)

    async def _handle(self, message: Start | Control | Ack) -> None:
        running = self._task is not None and not self._task.done()
        if isinstance(message, Ack):
            self.acknowledged(message.chunk)
        elif isinstance(message, Start):
            if running:
                error = RequestError("running", "a session is running here; cancel it first")
                await self.event(refusal(message, error))
            else:
                self._task = asyncio.create_task(self._serve_session(message))
        elif message.type == "cancel" and self._live is None and self._task is not None and running:
            self._task.cancel()  # it waits for a place
        elif message.type == "cancel":
            await self._answer(message)  # at once, whatever else is being worked on
        else:
            try:
                self._controls.put_nowait(message)
            except asyncio.QueueFull:
                error = RequestError("too_many_messages", f"{_WAITING_CONTROLS} controls wait already")
                await self.event(refusal(message, error))

    async def _serve_controls(self) -> None:
        """Serve controls in order, beside the reading of acknowledgements: encoding a prompt takes a while."""
        while True:
            await self._answer(await self._controls.get())

    async def _answer(self, message: Control) -> None:
        try:
            if self._live is None:
                raise RequestError("no_session", "no session is running; send start first")
            await self.event(await self._live.control(message))
        except RequestError as error:
            self._service.metrics.refused.labels(error.code).inc()
            await self.event(refusal(message, error))

    async def _serve_session(self, start: Start) -> None:
        """Wait for a place, live through a session, say how it ended."""
        log = SessionLog(secrets.token_hex(6), prompts=self._service.settings.log_prompts)
        try:
            reason, message = await self._in_place(start, log)
        except RequestError as error:
            self._service.metrics.refused.labels(error.code).inc()
            answer = refusal(start, error)
            if isinstance(error, BusyError):
                answer["error"]["retry_after"] = error.retry_after
            await self.event(answer)
            if error.code == "elsewhere":
                await self._close(_TRY_LATER, str(error))
            return
        except asyncio.CancelledError:  # only while it waits
            reason, message = "cancelled", "cancelled while waiting for a place"
        self._service.metrics.sessions.labels(reason).inc()
        log.info("session ended", reason=reason)
        await self.event({"type": "ended", "reason": reason, "message": message})
        if reason == "shutdown":
            await self._close(_RESTART, message)
        elif reason == "silent":
            await self._close(_POLICY, message)

    async def _in_place(self, start: Start, log: SessionLog) -> tuple[EndReason, str]:
        service, limits = self._service, self._limits
        if start.seconds is not None and start.seconds > limits.seconds:
            raise RequestError(
                "too_long", f"seconds is {start.seconds:g}; at most {limits.seconds:g}, or null for no end"
            )
        pipeline = service.pipeline
        if await service.has_better_neighbour():
            raise RequestError("elsewhere", "another server behind this address has room; connect again")
        async with service.places.place(self._tell_position, seconds=start.seconds):
            outlet = self._new_outlet(self, start, log.session)
            live = LiveSession(pipeline, start, outlet, limits=limits, metrics=service.metrics, log=log)
            self._live = service.live[log.session] = live
            try:
                return await live.run()
            finally:
                self._live = None
                del service.live[log.session]
                outlet.close()

    def acknowledged(self, chunk: int) -> None:
        """The client begins to show a chunk."""
        if self._live is not None:
            self._live.acknowledged(chunk)

    def _encoding_outlet(self, _: Connection, start: Start, session: str) -> ClosableOutlet:
        return EncodingOutlet(self, start.format, self._service.shape, session)

    def _tell_position(self, waiting: Waiting) -> None:
        message = {"type": "queued", "position": waiting.position, "seconds": waiting.seconds}
        post = asyncio.create_task(self.event(message))
        self._posts.add(post)
        post.add_done_callback(self._posts.discard)

    async def _leave(self) -> None:
        """End what runs for this client."""
        if self._task is None:
            return
        if self._live is not None:
            self._live.end("gone", "the client left")
        else:
            self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _close(self, code: int, reason: str) -> None:
        if self._socket.application_state is WebSocketState.CONNECTED:
            with suppress(RuntimeError, WebSocketDisconnect, OSError):
                await self._socket.close(code, reason)
