"""Clients of a server under test: one that speaks the stream's protocol, one for HTTP."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from serving.live.protocol import SUBPROTOCOL, MediaFrame

Message = dict[str, Any]


class StreamClient:
    """Collects what the server sends. Begins to show each chunk when it arrives, unless `shows` says otherwise."""

    def __init__(self, url: str, *, shows: bool = True, **options: Any) -> None:
        options.setdefault("subprotocols", [SUBPROTOCOL])
        context = connect(url.replace("http", "ws", 1) + "/v1/stream", max_size=None, proxy=None, **options)
        self.socket: ClientConnection = context.__enter__()
        self.shows = shows
        self.messages: list[Message] = []
        self.frames: list[MediaFrame] = []
        self.times: list[float] = []
        """When each message of `messages` came."""
        self.hello = self.until("hello")

    def __enter__(self) -> StreamClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, kind: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": kind, **fields}))

    def ask(self, kind: str, **fields: Any) -> Message:
        """Send a control and wait for its receipt."""
        self.send(kind, id=f"{kind}-{len(self.messages)}", **fields)
        identity = f"{kind}-{len(self.messages)}"
        return self.until("receipt", lambda message: message["id"] == identity)

    def start(self, prompt: str = "a red fox", **fields: Any) -> Message:
        return self.ask("start", prompt=prompt, **fields)

    def receive(self, timeout: float = 20) -> Message | MediaFrame:
        data = self.socket.recv(timeout=timeout)
        if isinstance(data, bytes):
            frame = MediaFrame.from_bytes(data)
            self.frames.append(frame)
            if frame.first and self.shows:
                with contextlib.suppress(ConnectionClosed):  # the last messages may still be unread
                    self.send("ack", chunk=frame.chunk)
            return frame
        message: Message = json.loads(data)
        self.messages.append(message)
        self.times.append(time.monotonic())
        return message

    def until(
        self, kind: str, condition: Callable[[Message], bool] = lambda _: True, timeout: float = 20
    ) -> Message:
        """The next message of a kind."""
        deadline = time.monotonic() + timeout
        while True:
            message = self.receive(max(0.001, deadline - time.monotonic()))
            if isinstance(message, dict) and message["type"] == kind and condition(message):
                return message

    def chunk(self, index: int) -> Message:
        """Wait for a chunk with all its pictures."""
        message = self.until("chunk", lambda message: message["chunk"] >= index)
        while not (self.frames and self.frames[-1].last and self.frames[-1].chunk == message["chunk"]):
            self.receive()
        return message

    def of(self, kind: str) -> list[Message]:
        return [message for message in self.messages if message["type"] == kind]

    def drain(self, seconds: float) -> None:
        """Receive whatever comes for a while."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            try:
                self.receive(left)
            except TimeoutError:
                return


@dataclass
class Answer:
    """What an HTTP request got."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def http(url: str, *, method: str = "GET", body: Any = None, headers: dict[str, str] | None = None) -> Answer:
    """Send a request; a body that is no bytes is sent as JSON."""
    headers = dict(headers or {})
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
        headers.setdefault("Content-Type", "application/json")
    try:
        with urlopen(Request(url, data=body, headers=headers, method=method), timeout=30) as answer:
            return Answer(answer.status, answer.read(), {k.lower(): v for k, v in answer.headers.items()})
    except HTTPError as error:
        return Answer(error.code, error.read(), {k.lower(): v for k, v in error.headers.items()})


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> bool:
    """Whether a condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
