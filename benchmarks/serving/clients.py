"""A client with a screen that shows chunks at the video's rate, and notes when what arrived."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.typing import Subprotocol

from serving.live.protocol import SUBPROTOCOL, MediaFrame

__all__ = ["Seen", "watch"]


@dataclass
class Seen:
    """What one client saw; times in seconds."""

    first_frame: float | None = None
    """From asking for a session to its first picture, waiting for a place left out."""
    intervals: list[float] = field(default_factory=list)
    """Between arrivals of chunks."""
    video: float = 0.0
    """Video received."""
    watched: float = 0.0
    """From the first picture to the end."""
    stalls: int = 0
    stalled: float = 0.0
    """How often, and how long, the screen had nothing to show."""
    receipts: list[float] = field(default_factory=list)
    """From a prompt switch to its receipt."""
    pictures: list[float] = field(default_factory=list)
    """From a prompt switch to its first picture."""
    dropped_frames: int = 0
    chunks: int = 0
    encode_per_frame: list[float] = field(default_factory=list)
    outside_engines: list[tuple[float, float]] = field(default_factory=list)
    """Of each chunk: the runtime's own seconds, and all of them."""


async def watch(
    url: str, prompts: list[str], *, seconds: float, switch_every: float, seed: int, chunks: int | None = None
) -> Seen:
    """Watch an endless stream for so long (or so many chunks), switching to a random prompt now and then."""
    generator = random.Random(seed)
    async with connect(
        url.replace("http", "ws", 1) + "/v1/stream",
        subprotocols=[Subprotocol(SUBPROTOCOL)],
        max_size=None,
        proxy=None,
    ) as socket:
        client = _Client(socket, json.loads(await socket.recv())["fps"])
        await client.send("start", id="start", prompt=generator.choice(prompts), seed=seed)
        reading = asyncio.create_task(client.read())
        await client.begun.wait()
        end = time.monotonic() + seconds
        while time.monotonic() < end and (chunks is None or client.seen.chunks < chunks):
            await asyncio.sleep(
                min(generator.expovariate(1 / switch_every), max(0.0, end - time.monotonic()))
            )
            await client.switch(generator.choice(prompts))
        await client.send("cancel", id="cancel")
        await reading
    return client.seen


class _Client:
    def __init__(self, socket: ClientConnection, fps: int) -> None:
        self.seen = Seen()
        self.begun = asyncio.Event()
        self._socket = socket
        self._fps = fps
        self._asked = 0.0
        self._last_arrival = 0.0
        self._free_at = 0.0
        """When the screen has shown all that has arrived."""
        self._switches: dict[str, float] = {}
        self._applied: dict[int, float] = {}
        self._acks: set[asyncio.Task[None]] = set()

    async def send(self, kind: str, **fields: Any) -> None:
        if kind == "start":
            self._asked = time.monotonic()
        await self._socket.send(json.dumps({"type": kind, **fields}))

    async def switch(self, prompt: str) -> None:
        identity = f"switch-{len(self._switches)}"
        self._switches[identity] = time.monotonic()
        await self.send("set_prompt", id=identity, prompt=prompt, recache="all")

    async def read(self) -> None:
        """Read until the session ends."""
        frames = 0
        async for data in self._socket:
            now = time.monotonic()
            if isinstance(data, bytes):
                frame = MediaFrame.from_bytes(data)
                frames += 1
                if frame.first:
                    self._first(frame.chunk, now)
                if frame.last:
                    self._last(frame.chunk, frames, now)
                    frames = 0
            elif self._note(json.loads(data), now):
                break
        if self.begun.is_set():
            self.seen.watched = time.monotonic() - self._asked - (self.seen.first_frame or 0.0)
        self.begun.set()
        for ack in self._acks:
            ack.cancel()

    def _note(self, message: dict[str, Any], now: float) -> bool:
        """Note a message; True when the session is over."""
        kind, seen = message["type"], self.seen
        if kind == "receipt" and message["action"] == "start":
            self._asked = now if message["accepted"] else self._asked
        elif kind == "receipt" and message["id"] in self._switches and message["accepted"]:
            seen.receipts.append(now - self._switches[message["id"]])
        elif kind == "chunk":
            seen.encode_per_frame.append(message["encode"] / message["frames"])
            seen.outside_engines.append(
                (message["other"], message["other"] + message["denoise"] + message["decode"])
            )
        elif kind == "applied":
            seen.pictures.append(now - self._switches[message["id"]])
        elif kind == "dropped":
            seen.dropped_frames += message["frames"]
        return bool(kind == "ended")

    def _first(self, chunk: int, now: float) -> None:
        if self.seen.first_frame is None:
            self.seen.first_frame = now - self._asked
            self._free_at = now
            self.begun.set()
        else:
            self.seen.intervals.append(now - self._last_arrival)
        self._last_arrival = now
        if now > self._free_at + 1 / self._fps:
            self.seen.stalls += 1
            self.seen.stalled += now - self._free_at
        begins = max(now, self._free_at)
        ack = asyncio.create_task(self._acknowledge(chunk, begins - now))
        self._acks.add(ack)
        ack.add_done_callback(self._acks.discard)

    def _last(self, chunk: int, frames: int, now: float) -> None:
        self.seen.chunks += 1
        self.seen.video += frames / self._fps
        self._free_at = max(self._last_arrival, self._free_at) + frames / self._fps

    async def _acknowledge(self, chunk: int, after: float) -> None:
        await asyncio.sleep(after)
        await self.send("ack", chunk=chunk)
