"""Live sessions over a real WebSocket: receipts, pacing, dropping, pausing, flushing, waiting for a place."""

from __future__ import annotations

import asyncio
import io
import time
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed

from runtime import Pipeline
from serving.live.protocol import MediaFrame
from serving.neighbours import keep_reporting
from tests.serving.client import StreamClient, wait_until
from tests.serving.conftest import FPS, RunningServer, StartServer


def decode(frames: list[MediaFrame]) -> dict[int, np.ndarray]:
    """Pictures by frame number, as a decoder that gets every access unit shows them."""
    decoder: Any = av.CodecContext.create("h264", "r")
    shown: dict[int, np.ndarray] = {}
    for frame in frames:
        images = decoder.decode(av.Packet(frame.payload))
        assert len(images) == 1
        shown[frame.frame] = images[0].to_ndarray(format="rgb24")
    return shown


def test_a_session_with_a_length(server: RunningServer) -> None:
    with StreamClient(server.url) as client:
        assert client.hello["protocol"] == 1
        receipt = client.start(seed=7, seconds=0.5)
        assert receipt["accepted"] and (receipt["chunk"], receipt["time"], receipt["seed"]) == (0, 0.0, 7)
        ended = client.until("ended")
    assert ended["reason"] == "completed"
    chunks = client.of("chunk")
    assert [(chunk["chunk"], chunk["frame"], chunk["frames"]) for chunk in chunks] == [
        (0, 0, 9),
        (1, 9, 12),
        (2, 21, 12),
    ]
    assert [frame.frame for frame in client.frames] == list(range(33))
    assert [frame.time_us for frame in client.frames] == [round(1e6 * n / FPS) for n in range(33)]
    assert [frame.chunk for frame in client.frames if frame.first] == [0, 1, 2]
    assert [frame.frame for frame in client.frames if frame.keyframe] == [0]
    for chunk in chunks:
        assert min(chunk["denoise"], chunk["decode"], chunk["encode"]) > 0


@pytest.mark.parametrize("kind", ["h264", "jpeg"])
def test_pictures_are_those_of_the_runtime(server: RunningServer, kind: str) -> None:
    with StreamClient(server.url) as client:
        client.start("a red fox", seed=5, seconds=0.25, format=kind)
        client.until("ended")
    if kind == "h264":
        shown = decode(client.frames)
    else:
        shown = {f.frame: np.asarray(Image.open(io.BytesIO(f.payload))) for f in client.frames}
    with (
        Pipeline.load(server.service.settings.bundle, threads=1) as pipe,
        pipe.session("a red fox", seed=5) as s,
    ):
        frames = np.concatenate([chunk.frames for chunk in s.stream(seconds=0.25)])
    assert sorted(shown) == list(range(len(frames)))
    # H.264 halves the colour's resolution, and the hand-made bundle's pictures are noise: compare brightness.
    weights = np.array([0.2126, 0.7152, 0.0722])
    for number, picture in shown.items():
        error = np.abs(picture @ weights - frames[number] @ weights).mean()
        assert error < 6, (number, error)


def test_a_client_has_at_most_one_chunk_that_it_has_not_begun_to_show(server: RunningServer) -> None:
    """It begins to show a chunk when the one before is over, as screens do."""
    with StreamClient(server.url, shows=False) as client:
        client.start(seed=1)
        client.chunk(0)
        begun = time.monotonic()
        for index in range(5):
            client.send("ack", chunk=index)
            client.chunk(index + 1)
            assert [message["chunk"] for message in client.of("chunk")][-1] == index + 1
            client.drain(max(0.0, begun + (9 + 12 * index) / FPS - time.monotonic()))
            assert client.of("chunk")[-1]["chunk"] == index + 1  # nothing more came
        assert not client.of("dropped")


def test_chunks_are_dropped_for_a_slow_client_and_counted(server: RunningServer) -> None:
    with StreamClient(server.url, shows=False) as client:
        client.start(seed=1)
        client.chunk(0)
        client.send("ack", chunk=0)
        client.chunk(1)
        first = client.until("dropped")  # chunk 1 was never begun
        assert (first["chunk"], first["frames"], first["total_frames"], first["reason"]) == (
            2,
            12,
            12,
            "slow",
        )
        second = client.until("dropped")
        assert (second["chunk"], second["total_frames"]) == (3, 24)
        assert [message["chunk"] for message in client.of("chunk")] == [0, 1]
        client.send("ack", chunk=1)
        client.shows = True
        client.chunk(4)
        client.chunk(5)
    after = [frame for frame in client.frames if frame.chunk > 1]
    assert after[0].first and after[0].keyframe and after[0].gap
    assert not any(frame.gap or frame.keyframe for frame in after[1:])
    decode(after)  # stands on its own


def test_a_prompt_switch_applies_where_its_receipt_says(server: RunningServer) -> None:
    with StreamClient(server.url) as client:
        client.start("a red fox", seed=3)
        client.chunk(1)
        receipt = client.ask("set_prompt", prompt="snow in sea", recache="all")
        assert receipt["accepted"]
        applied = client.until("applied")
        client.chunk(receipt["chunk"] + 1)
    assert applied["id"] == receipt["id"]
    assert applied["chunk"] == receipt["chunk"] and applied["time"] == receipt["time"]
    assert receipt["time"] == pytest.approx((9 + 12 * (receipt["chunk"] - 1)) / FPS, abs=1e-6)
    assert [chunk["chunk"] for chunk in client.of("chunk") if chunk["switched"]] == [receipt["chunk"]]
    with (
        Pipeline.load(server.service.settings.bundle, threads=1) as pipe,
        pipe.session("a red fox", seed=3) as s,
    ):
        s.set_prompt("snow in sea", recache="all", at=receipt["chunk"])
        frames = np.concatenate([chunk.frames for chunk in s.stream(chunks=receipt["chunk"] + 2)])
    shown = decode(client.frames)
    for number in range(len(frames)):
        assert np.abs(shown[number].mean() - frames[number].mean()) < 4


def test_a_schedule_of_prompts(server: RunningServer) -> None:
    schedule = [{"at": 2, "prompt": "snow"}, {"at": 3, "prompt": "sea", "over": 2}]
    with StreamClient(server.url) as client:
        client.start("a", schedule=schedule, seconds=1.0)
        client.until("ended")
    assert [chunk["chunk"] for chunk in client.of("chunk") if chunk["switched"]] == [2, 3]


def test_of_two_switches_for_one_chunk_the_later_is_applied(server: RunningServer) -> None:
    with StreamClient(server.url) as client:
        client.start("a")
        one = client.ask("set_prompt", prompt="snow", at=4)
        two = client.ask("set_prompt", prompt="sea", at=4)
        assert one["chunk"] == two["chunk"] == 4
        assert client.until("applied")["id"] == two["id"]
        client.chunk(5)
        assert len(client.of("applied")) == 1


def test_pause_and_resume(server: RunningServer) -> None:
    with StreamClient(server.url) as client:
        client.start("a", seed=2)
        client.chunk(2)
        paused = client.ask("pause")
        client.drain(0.2)  # what was on its way
        sent = client.of("chunk")[-1]["chunk"]
        assert paused["chunk"] >= sent
        client.drain(0.5)
        assert client.of("chunk")[-1]["chunk"] == sent
        resumed = client.ask("resume")
        assert resumed["chunk"] == sent + 1
        client.chunk(sent + 2)
    later = [frame for frame in client.frames if frame.chunk > sent]
    assert later[0].chunk == sent + 1 and later[0].keyframe and not later[0].gap
    assert not client.of("dropped")
    decode(later)


def test_flush_drops_what_is_not_shown(server: RunningServer) -> None:
    with StreamClient(server.url) as client:
        client.start("a", seed=2)
        client.chunk(2)
        switched = client.ask("set_prompt", prompt="snow")
        flushed = client.ask("flush")
        assert flushed["accepted"] and flushed["chunk"] <= switched["chunk"]
        assert flushed["dropped_frames"] == 12 * flushed["dropped_chunks"]
        before = len(client.frames)
        client.chunk(flushed["chunk"])
        client.until("applied")
    after = client.frames[before:]
    assert after[0].chunk == flushed["chunk"] and after[0].keyframe and after[0].gap


def test_a_keyframe_on_request(server: RunningServer) -> None:
    with StreamClient(server.url) as client:
        client.start("a")
        client.chunk(1)
        receipt = client.ask("keyframe")
        client.chunk(receipt["chunk"] + 1)
    keyframes = [frame.chunk for frame in client.frames if frame.keyframe]
    assert keyframes[0] == 0 and len(keyframes) == 2 and keyframes[1] - receipt["chunk"] in (0, 1)


def test_cancel_and_start_again(server: RunningServer) -> None:
    with StreamClient(server.url) as client:
        for _ in range(3):
            assert client.start("a")["accepted"]
            client.chunk(1)
            assert client.ask("cancel")["accepted"]
            assert client.until("ended")["reason"] == "cancelled"
    assert wait_until(lambda: server.service.places.taken == 0)


def test_the_third_waits_and_comes_in_when_one_leaves(server: RunningServer) -> None:
    with StreamClient(server.url) as one, StreamClient(server.url) as two, StreamClient(server.url) as three:
        one.start("a")
        two.start("a")
        three.send("start", id="x", prompt="a", seconds=0.25)
        assert three.until("queued")["position"] == 1
        with StreamClient(server.url) as four, StreamClient(server.url) as five:
            four.send("start", id="y", prompt="a")
            assert four.until("queued")["position"] == 2
            refused = five.start("a")
            assert not refused["accepted"] and refused["error"]["code"] == "busy"
            assert refused["error"]["retry_after"] >= 1
            four.send("cancel", id="z")
            assert four.until("ended")["reason"] == "cancelled"
        begun = time.monotonic()
        one.socket.close()
        assert three.until("receipt")["accepted"]
        assert time.monotonic() - begun < 1.0
        assert three.until("ended")["reason"] == "completed"


def test_a_client_that_vanishes_frees_its_place_within_a_second(server: RunningServer) -> None:
    client = StreamClient(server.url)
    client.start("a")
    client.chunk(1)
    assert server.service.places.taken == 1
    begun = time.monotonic()
    client.socket.socket.close()  # no closing handshake: as if the process were killed
    assert wait_until(lambda: server.service.places.taken == 0, 5)
    assert time.monotonic() - begun < 1.0


def test_a_silent_client_is_sent_away(start_server: StartServer) -> None:
    server = start_server(limits={"ack_timeout": 0.5})
    with StreamClient(server.url, shows=False) as client:
        client.start("a")
        assert client.until("ended")["reason"] == "silent"
        with pytest.raises(ConnectionClosed):
            client.receive()
    assert server.service.places.taken == 0


def test_sessions_side_by_side_are_those_alone(server: RunningServer) -> None:
    def run(client: StreamClient) -> list[bytes]:
        client.until("ended")
        return [frame.payload for frame in client.frames]

    with StreamClient(server.url) as alone:
        alone.start("a red fox", seed=4, seconds=0.5)
        expected = run(alone)
    with StreamClient(server.url) as one, StreamClient(server.url) as two:
        one.start("a red fox", seed=4, seconds=0.5)
        two.start("snow", seed=9, seconds=0.5)
        assert run(one) == expected
        assert run(two) != expected


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"prompt": "x" * 3000}, "prompt_too_long"),
        ({"prompt": "a", "schedule": [{"at": 1, "prompt": "x" * 3000}]}, "prompt_too_long"),
        ({"prompt": "a", "schedule": [{"at": n, "prompt": "b"} for n in range(80)]}, "schedule_too_long"),
        ({"prompt": "a", "seconds": 1e6}, "too_long"),
    ],
)
def test_refused_starts(server: RunningServer, fields: dict[str, Any], code: str) -> None:
    with StreamClient(server.url) as client:
        receipt = client.start(**fields)
        assert not receipt["accepted"] and receipt["error"]["code"] == code
        assert client.start("a")["accepted"]  # the connection is as good as before


def test_refused_controls(server: RunningServer) -> None:
    with StreamClient(server.url) as client:
        for kind, fields in (("pause", {}), ("flush", {}), ("cancel", {}), ("set_prompt", {"prompt": "a"})):
            assert client.ask(kind, **fields)["error"]["code"] == "no_session"
        client.start("a")
        client.chunk(2)
        assert client.ask("start", prompt="a")["error"]["code"] == "running"
        late = client.ask("set_prompt", prompt="snow", at=0)
        assert (
            late["error"]["code"] == "bad_input" and "chunk 0 has already started" in late["error"]["message"]
        )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"type": "start"}',
        '{"type": "start", "prompt": 7}',
        '{"type": "start", "prompt": "a", "seed": -1}',
        '{"type": "start", "prompt": "a", "seconds": NaN}',
        '{"type": "start", "prompt": "a", "secret": 1}',
        '{"type": "shutdown"}',
        '{"type": "set_prompt", "prompt": "a", "over": 1e9}',
        '{"type": "ack", "chunk": true}',
        "[" * 10_000,
    ],
)
def test_messages_that_cannot_be_read(server: RunningServer, text: str) -> None:
    with StreamClient(server.url) as client:
        client.socket.send(text)
        assert client.until("error")["code"] == "bad_message"
        assert client.start("a", seconds=0.5)["accepted"]


def test_too_many_bad_messages_and_too_large_ones_close_the_socket(server: RunningServer) -> None:
    with StreamClient(server.url) as client:
        for _ in range(10):
            client.socket.send(b"binary")
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                client.receive()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1008
    with StreamClient(server.url) as client:
        client.socket.send('{"type": "start", "prompt": "' + "x" * 100_000 + '"}')
        with pytest.raises(ConnectionClosed) as closed:
            client.receive()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009


class Neighbour:
    """Another server that has room, or has not."""

    def __init__(self, room: bool) -> None:
        self.room = room

    async def report(self, free: int) -> None:
        pass

    async def have_room(self) -> bool:
        return self.room


@pytest.mark.parametrize("room", [True, False])
def test_a_client_goes_elsewhere_only_if_there_is_room(start_server: StartServer, room: bool) -> None:
    server = start_server(sessions=1)
    server.service.neighbours = Neighbour(room)
    with StreamClient(server.url) as one, StreamClient(server.url) as two:
        assert one.start("a")["accepted"]  # there is a place here
        two.send("start", id=1, prompt="a")
        if not room:
            assert two.until("queued")["position"] == 1
            return
        assert two.until("receipt")["error"]["code"] == "elsewhere"
        with pytest.raises(ConnectionClosed) as closed:
            two.receive()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1013


def test_free_places_are_reported_when_they_change() -> None:
    class Board(Neighbour):
        told: list[int]

        async def report(self, free: int) -> None:
            self.told.append(free)

    async def run() -> list[int]:
        board, free = Board(room=True), [2]
        board.told = []
        task = asyncio.create_task(keep_reporting(board, lambda: free[0]))
        for value in (2, 1, 0):
            free[0] = value
            await asyncio.sleep(0.3)
        task.cancel()
        return board.told

    assert asyncio.run(run()) == [2, 1, 0]
