"""Pictures on their way to a WebSocket: encoded beside the event loop, then sent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Protocol

from serving.live.encoder import VideoShape, new_encoder
from serving.live.protocol import MediaFrame
from serving.live.session import Picture
from serving.tracing import span

__all__ = ["EncodingOutlet", "Wire"]

_encoders = ThreadPoolExecutor(thread_name_prefix="lightforcing-encode")


class Wire(Protocol):
    """What carries messages to a client."""

    async def event(self, message: dict[str, Any]) -> None:
        """Send a message."""

    async def media(self, frames: list[MediaFrame]) -> None:
        """Send pictures."""


class EncodingOutlet:
    """Implements `Outlet` over a wire."""

    def __init__(self, wire: Wire, kind: Literal["h264", "jpeg"], shape: VideoShape, session: str) -> None:
        self._wire = wire
        self._shape = shape
        self._session = session
        self._encoder = new_encoder(kind, shape)

    async def event(self, message: dict[str, Any]) -> None:
        """See `Outlet.event`."""
        await self._wire.event(message)

    async def picture(self, picture: Picture, describe: Callable[[float], dict[str, Any]]) -> float:
        """See `Outlet.picture`."""
        loop = asyncio.get_running_loop()
        frames, seconds = await loop.run_in_executor(_encoders, self._encode, picture)
        await self._wire.event(describe(seconds))
        await self._wire.media(frames)
        return seconds

    def close(self) -> None:
        """Let go of the encoder."""
        self._encoder.close()

    def _encode(self, picture: Picture) -> tuple[list[MediaFrame], float]:
        begun = time.perf_counter()
        with span("encode", session=self._session, chunk=picture.chunk):
            encoded = self._encoder.encode(picture.frames, keyframe=picture.keyframe)
        seconds = time.perf_counter() - begun
        count = len(encoded)
        frames = [
            MediaFrame(
                kind=self._encoder.kind,
                chunk=picture.chunk,
                frame=picture.frame + index,
                time_us=round((picture.frame + index) * 1e6 / self._shape.fps),
                payload=unit.payload,
                keyframe=unit.keyframe,
                first=index == 0,
                last=index == count - 1,
                gap=picture.gap and index == 0,
            )
            for index, unit in enumerate(encoded)
        ]
        return frames, seconds
