"""Live sessions over WebRTC: a real peer, with both ends on loopback."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import numpy as np
import pytest

from runtime import Pipeline
from tests.serving.client import http, wait_until
from tests.serving.conftest import RunningServer, StartServer

aiortc = pytest.importorskip("aiortc", reason="aiortc is not installed (extra webrtc)")


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """ICE offers every address of the machine but loopback; here it offers nothing else."""
    import aioice.ice

    monkeypatch.setattr(aioice.ice, "get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])
    yield


class Peer:
    """A client: its messages as they come, and the pictures that its track shows."""

    def __init__(self) -> None:
        self.connection = aiortc.RTCPeerConnection(aiortc.RTCConfiguration(iceServers=[]))
        self.channel = self.connection.createDataChannel("control")
        self.connection.addTransceiver("video", direction="recvonly")
        self.messages: list[dict[str, Any]] = []
        self.news = asyncio.Event()
        self.track: Any = None
        self.channel.on("message", self.take)
        self.connection.on("track", lambda track: setattr(self, "track", track))

    def take(self, text: str) -> None:
        self.messages.append(json.loads(text))
        self.news.set()

    async def connect(self, url: str) -> None:
        await self.connection.setLocalDescription(await self.connection.createOffer())
        own = self.connection.localDescription
        answer = await asyncio.to_thread(
            http, f"{url}/v1/webrtc", method="POST", body={"type": own.type, "sdp": own.sdp}
        )
        assert answer.status == 200, answer.body
        await self.connection.setRemoteDescription(aiortc.RTCSessionDescription(**answer.json))
        await self.until("hello")

    def send(self, kind: str, **fields: Any) -> None:
        self.channel.send(json.dumps({"type": kind, **fields}))

    async def until(
        self, kind: str, condition: Callable[[dict[str, Any]], bool] = lambda _: True
    ) -> dict[str, Any]:
        async with asyncio.timeout(20):
            while True:
                for message in self.messages:
                    if message["type"] == kind and condition(message):
                        return message
                self.news.clear()
                await self.news.wait()

    async def picture(self) -> np.ndarray:
        async with asyncio.timeout(20):
            return (await self.track.recv()).to_ndarray(format="rgb24")


def run(server: RunningServer, visit: Callable[[Peer], Awaitable[None]]) -> None:
    async def visited() -> None:
        peer = Peer()
        try:
            await peer.connect(server.url)
            await visit(peer)
        finally:
            await peer.connection.close()

    asyncio.run(visited())


def test_a_session_with_a_switch(start_server: StartServer) -> None:
    server = start_server()

    async def visit(peer: Peer) -> None:
        peer.send("start", id=1, prompt="a red fox", seed=3)
        assert (await peer.until("receipt"))["accepted"]
        shown = await peer.picture()
        await peer.until("chunk", lambda message: message["chunk"] == 2)
        peer.send("set_prompt", id=2, prompt="snow", recache="all")
        receipt = await peer.until("receipt", lambda message: message["id"] == 2)
        applied = await peer.until("applied")
        assert (applied["id"], applied["chunk"]) == (2, receipt["chunk"])
        assert not [message for message in peer.messages if message["type"] == "dropped"]
        with (
            Pipeline.load(server.service.settings.bundle, threads=1) as pipe,
            pipe.session("a red fox", seed=3) as s,
        ):
            expected = next(iter(s.stream())).frames
        errors = [np.abs(shown.astype(int).mean() - frame.astype(int).mean()) for frame in expected]
        assert shown.shape == expected.shape[1:] and min(errors) < 10
        peer.send("cancel", id=3)
        assert (await peer.until("ended"))["reason"] == "cancelled"

    run(server, visit)
    assert wait_until(lambda: server.service.places.taken == 0 and not server.service.connections)


def test_pausing_stops_the_picture_and_the_work(start_server: StartServer) -> None:
    server = start_server()

    async def visit(peer: Peer) -> None:
        peer.send("start", id=1, prompt="a")
        await peer.until("chunk", lambda message: message["chunk"] == 1)
        peer.send("pause", id=2)
        await peer.until("receipt", lambda message: message["id"] == 2)
        await asyncio.sleep(0.3)
        before = len(peer.messages)
        await asyncio.sleep(0.7)
        assert len(peer.messages) == before
        peer.send("resume", id=3)
        reached = max(message["chunk"] for message in peer.messages if message["type"] == "chunk")
        await peer.until("chunk", lambda message: message["chunk"] == reached + 3)

    run(server, visit)
    assert wait_until(lambda: server.service.places.taken == 0)  # the peer left without a word


@pytest.mark.parametrize("body", [{}, {"type": "answer", "sdp": ""}, {"type": "offer", "sdp": "nonsense"}])
def test_unusable_offers(server: RunningServer, body: dict[str, str]) -> None:
    answer = http(f"{server.url}/v1/webrtc", method="POST", body=body)
    assert answer.status == 422 and answer.json["error"]["code"] in ("bad_request", "bad_offer")
