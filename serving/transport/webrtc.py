"""`POST /v1/webrtc`: the same sessions over WebRTC, for networks where it is needed.

The client offers a data channel, which carries the control messages of `/v1/stream`, and a video track to receive.
The track shows chunks at the video's rate and says itself when it begins one, so clients send no `ack`.
"""

from __future__ import annotations

import asyncio
import fractions
import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from aiortc import (
    MediaStreamTrack,
    RTCConfiguration,
    RTCDataChannel,
    RTCIceServer,
    RTCPeerConnection,
    RTCSessionDescription,
)
from av import VideoFrame
from fastapi import APIRouter, Request
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from starlette.websockets import WebSocketState

from serving.errors import RequestError
from serving.live.session import Picture
from serving.service import Service

from .connection import Connection, connected

__all__ = ["router"]

_CLOCK_RATE = 90_000
_CONNECT_SECONDS = 20.0
_WAITING_MESSAGES = 256


class Offer(BaseModel):
    """A client's session description."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["offer"]
    sdp: str


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter()

    @routes.post("/v1/webrtc")
    async def offer(request: Request, body: Offer) -> dict[str, str]:
        """Answer an offer."""
        fps = service.shape.fps  # 503 unless sessions are taken
        # Without servers named, aiortc would ask one on the internet.
        servers = [RTCIceServer(address) for address in service.settings.ice_servers]
        peer = RTCPeerConnection(RTCConfiguration(iceServers=servers))
        track = ChunkTrack(fps)
        peer.addTrack(track)
        socket = ChannelSocket(peer, track)
        try:
            await peer.setRemoteDescription(RTCSessionDescription(body.sdp, body.type))
            await peer.setLocalDescription(await peer.createAnswer())
        except Exception as error:  # aiortc raises whatever its parser stumbles over
            await peer.close()
            raise RequestError(
                "bad_offer", f"the offer cannot be answered ({type(error).__name__})", status=422
            ) from None
        client = request.client.host if request.client else "unknown"
        service.keep(asyncio.create_task(_serve(service, client, socket, track)))
        return {"type": peer.localDescription.type, "sdp": peer.localDescription.sdp}

    return routes


async def _serve(service: Service, client: str, socket: ChannelSocket, track: ChunkTrack) -> None:
    try:
        with connected(service, client):
            async with asyncio.timeout(_CONNECT_SECONDS):
                await socket.opened.wait()
            connection = Connection(socket, service, lambda wire, _, __: TrackOutlet(wire, track))
            track.shown = connection.acknowledged
            await connection.serve()
    finally:
        await socket.close()


@dataclass(frozen=True, eq=False)
class _Frame:
    chunk: int
    image: NDArray[np.uint8]
    first: bool


class ChunkTrack(MediaStreamTrack):  # type: ignore[misc]
    """A video track that plays chunks at their rate, and stands still when it has none."""

    kind = "video"

    def __init__(self, fps: int) -> None:
        super().__init__()
        self.shown: Callable[[int], None] = lambda _: None
        """Called as each chunk begins."""
        self._fps = fps
        self._frames: deque[_Frame] = deque()
        self._news = asyncio.Event()
        self._paused = False
        self._due = 0.0
        self._begun: float | None = None

    def play(self, picture: Picture) -> None:
        """Show frames after those that are there."""
        self._frames += [
            _Frame(picture.chunk, image, first=index == 0) for index, image in enumerate(picture.frames)
        ]
        self._news.set()

    def steer(self, action: str) -> None:
        """Follow a control that was accepted."""
        if action == "flush":
            self._frames.clear()
        self._paused = action == "pause" or (self._paused and action != "resume")
        self._news.set()

    async def recv(self) -> VideoFrame:
        """The next frame, when it is due."""
        frame = await self._next()
        if frame.first:
            self.shown(frame.chunk)
        height, width = frame.image.shape[:2]
        even = np.pad(frame.image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        picture = VideoFrame.from_ndarray(even, format="rgb24")
        self._begun = self._due if self._begun is None else self._begun
        picture.pts = round((self._due - self._begun) * _CLOCK_RATE)
        picture.time_base = fractions.Fraction(1, _CLOCK_RATE)
        return picture

    async def _next(self) -> _Frame:
        while True:
            while self._paused or not self._frames:
                self._news.clear()
                await self._news.wait()
            now = time.monotonic()
            due = max(self._due + 1 / self._fps, now)
            await asyncio.sleep(due - now)
            if self._frames and not self._paused:  # still, after the sleep
                self._due = due
                return self._frames.popleft()


class TrackOutlet:
    """Implements `Outlet`: events by the channel, pictures by the track, which encodes."""

    def __init__(self, wire: Connection, track: ChunkTrack) -> None:
        self._wire = wire
        self._track = track

    async def event(self, message: dict[str, Any]) -> None:
        """See `Outlet.event`."""
        await self._wire.event(message)

    async def picture(self, picture: Picture, describe: Callable[[float], dict[str, Any]]) -> float:
        """See `Outlet.picture`. The track's encoder reports no times."""
        await self._wire.event(describe(0.0))
        self._track.play(picture)
        return 0.0

    def close(self) -> None:
        """Show nothing more."""
        self._track.steer("flush")


class ChannelSocket:
    """Implements `Socket` over the client's data channel."""

    def __init__(self, peer: RTCPeerConnection, track: ChunkTrack) -> None:
        self.application_state = WebSocketState.CONNECTED
        self.opened = asyncio.Event()
        self._peer = peer
        self._track = track
        self._channel: RTCDataChannel | None = None
        self._received: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        peer.on("datachannel", self._open)
        peer.on("connectionstatechange", self._changed)

    async def receive(self) -> dict[str, Any]:
        """See `Socket.receive`."""
        return await self._received.get()

    async def send_json(self, data: Any) -> None:
        """See `Socket.send_json`."""
        if data.get("type") == "receipt" and data["accepted"]:
            self._track.steer(data["action"])
        if self._channel is not None and self._channel.readyState == "open":
            self._channel.send(json.dumps(data))

    async def send_bytes(self, data: bytes) -> None:
        """Pictures go over the track."""
        raise NotImplementedError

    async def close(self, code: int = 1000, reason: str | None = None) -> None:
        """Close the connection; the reason was told in a message, if there was one."""
        self.application_state = WebSocketState.DISCONNECTED
        await self._peer.close()

    def _open(self, channel: RTCDataChannel) -> None:
        if self._channel is None:
            self._channel = channel
            channel.on("message", self._take)
            channel.on("close", self._leave)
            self.opened.set()

    def _take(self, message: str | bytes) -> None:
        if self._received.qsize() >= _WAITING_MESSAGES:
            self._leave()
            return
        name = "text" if isinstance(message, str) else "bytes"
        self._received.put_nowait({"type": "websocket.receive", name: message})

    def _changed(self) -> None:
        if self._peer.connectionState in ("failed", "closed", "disconnected"):
            self._leave()

    def _leave(self) -> None:
        self._received.put_nowait({"type": "websocket.disconnect", "code": 1005})
