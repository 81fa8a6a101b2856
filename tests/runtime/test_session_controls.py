"""What a server needs of sessions: labels, flushing, transitions, time limits, events, statistics, health."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import (
    ChunkStarted,
    ChunkTimeoutError,
    InputError,
    Pipeline,
    Session,
    SessionCancelledError,
    SessionFailedError,
)
from tests.runtime.conftest import MakeBundle

CHUNKS = 8


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(bundle, sessions=2, threads=1) as pipeline:
        yield pipeline


def frames(session: Session, chunks: int = CHUNKS) -> list[bytes]:
    return [chunk.frames.tobytes() for chunk in session.stream(chunks=chunks)]


def settle(session: Session, index: int) -> None:
    """Wait until chunk `index` would be the next to start, and see that it stays so."""
    deadline = time.monotonic() + 20
    while session.index < index and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.05)
    assert session.index == index


def test_chunks_carry_the_label_of_their_prompt(pipe: Pipeline) -> None:
    started: list[ChunkStarted] = []
    with pipe.session("a", label="first", on_start=started.append) as session:
        session.set_prompt("snow", at=2, label="second")
        session.set_prompt("sea", at=4)
        labels = [chunk.label for chunk in session.stream(chunks=6)]
    assert labels == ["first", "first", "second", "second", None, None]
    assert started == [ChunkStarted(index, label, index in (2, 4)) for index, label in enumerate(labels)]


def test_an_error_in_a_callback_ends_its_session_only(pipe: Pipeline) -> None:
    def refuse(event: ChunkStarted) -> None:
        if event.index == 1:
            raise RuntimeError("no thanks")

    with pipe.session("a", on_start=refuse) as session, pipe.session("a") as other:
        with pytest.raises(SessionFailedError, match="chunk 1 failed: no thanks"):
            frames(session)
        assert session.state == "failed"
        assert len(frames(other)) == CHUNKS


def test_without_a_chunk_ahead_a_prompt_applies_to_the_very_next(pipe: Pipeline) -> None:
    with pipe.session("a red fox", seed=3) as session:
        stream = session.stream(ahead=0)
        for index in range(3):
            assert next(stream).index == index
            settle(session, index + 1)
        assert session.set_prompt("snow") == 3
        stream.ahead = 1
        next(stream)
        settle(session, 5)


def test_both_ways_of_asking_give_the_same_bits(pipe: Pipeline) -> None:
    with pipe.session("a red fox", seed=3) as one, pipe.session("a red fox", seed=3) as two:
        assert frames(one) == [chunk.frames.tobytes() for chunk in two.stream(chunks=CHUNKS, ahead=0)]


def test_flush_skips_what_was_not_delivered(pipe: Pipeline) -> None:
    with pipe.session("a", seed=5) as session:
        session.set_prompt("snow", at=4)
        whole = frames(session)
    with pipe.session("a", seed=5) as session:
        stream = session.stream(chunks=CHUNKS)
        kept = [next(stream), next(stream)]
        settle(session, 3)
        assert session.set_prompt("snow", at=4) == 4
        assert session.flush() == (1, 3)
        assert session.flush() == (0, 3)
        rest = list(stream)
        assert [chunk.index for chunk in (*kept, *rest)] == [0, 1, 3, 4, 5, 6, 7]
        assert [chunk.frames.tobytes() for chunk in rest] == whole[3:]
        statistics = session.statistics
    assert (statistics.chunks, statistics.delivered, statistics.flushed) == (8, 7, 1)
    assert statistics.frames == 9 + 7 * 12
    assert statistics.latency >= statistics.denoise + statistics.decode > 0


def test_flush_while_a_consumer_waits(pipe: Pipeline) -> None:
    with pipe.session("a", seed=5) as session:
        indices: list[int] = []
        thread = threading.Thread(
            target=lambda: indices.extend(chunk.index for chunk in session.stream(chunks=60))
        )
        thread.start()
        dropped = 0
        while thread.is_alive():
            dropped += session.flush()[0]
            time.sleep(0.001)
        thread.join(30)
        assert len(indices) + dropped == 60 and dropped > 0
        assert indices == sorted(set(indices))


def test_a_transition_moves_in_equal_steps(pipe: Pipeline) -> None:
    before, after = pipe.embed("a red fox"), pipe.embed("snow in sea")
    with pipe.session("a red fox", seed=2) as session:
        assert session.set_prompt("snow in sea", at=2, over=3, label="new") == 2
        chunks = list(session.stream(chunks=CHUNKS))
    assert [chunk.label for chunk in chunks] == [None] * 2 + ["new"] * 6
    with pipe.session("a red fox", seed=2) as session:
        for step in (1, 2, 3):
            mixed = after if step == 3 else before + (after - before) * np.float32(step / 3)
            session.set_prompt(embedding=mixed, at=1 + step)
        assert frames(session) == [chunk.frames.tobytes() for chunk in chunks]


def test_a_newer_prompt_ends_a_transition(pipe: Pipeline) -> None:
    with pipe.session("a", seed=2) as session:
        session.set_prompt("snow", at=1, over=5)
        session.set_prompt("sea", at=3)
        interrupted = frames(session)
    with pipe.session("a", seed=2) as session:
        start, end = pipe.embed("a"), pipe.embed("snow")
        for step in (1, 2):
            session.set_prompt(embedding=start + (end - start) * np.float32(step / 5), at=step)
        session.set_prompt("sea", at=3)
        assert frames(session) == interrupted


def test_a_blend_is_the_weighted_mean(pipe: Pipeline) -> None:
    mixed = pipe.blend({"a red fox": 3, "snow": 1})
    expected = 0.75 * pipe.embed("a red fox") + 0.25 * pipe.embed("snow")
    np.testing.assert_allclose(mixed, expected, rtol=1e-6, atol=1e-7)
    assert np.array_equal(pipe.blend({"snow": 5}), pipe.embed("snow"))


@pytest.mark.parametrize(
    "weights", [{}, {"a": 0}, {"a": -1.0, "snow": 2}, {"a": float("nan")}, {"a": float("inf")}]
)
def test_unusable_blend(pipe: Pipeline, weights: dict[str, float]) -> None:
    with pytest.raises(InputError, match="weights"):
        pipe.blend(weights)


@pytest.mark.parametrize(
    "options", [{"timeout": 0}, {"timeout": -1.0}, {"timeout": float("nan")}, {"ahead": 2}]
)
def test_unusable_stream_options(pipe: Pipeline, options: dict[str, Any]) -> None:
    with pipe.session("a") as session, pytest.raises(InputError, match=next(iter(options))):
        session.stream(**options)


@pytest.mark.parametrize("over", [0, -1, 1.5, True])
def test_unusable_transition(pipe: Pipeline, over: Any) -> None:
    with pipe.session("a") as session, pytest.raises(InputError, match="over is"):
        session.set_prompt("snow", over=over)


def test_a_chunk_that_does_not_come_in_time(pipe: Pipeline) -> None:
    """A callback holds the worker up; afterwards the stream goes on where it was."""
    held = threading.Event()
    with pipe.session("a", seed=1) as session:
        whole = frames(session, 3)
    with pipe.session("a", seed=1, on_start=lambda _: bool(held.wait(30))) as session:
        stream = session.stream(chunks=3, timeout=0.05)
        with pytest.raises(ChunkTimeoutError, match=r"chunk 0 did not come within 0\.05 s"):
            next(stream)

        async def ask() -> None:
            await anext(stream)

        with pytest.raises(TimeoutError):
            asyncio.run(ask())
        held.set()
        assert frames(session, 3) == whole


def test_state_of_a_session(pipe: Pipeline) -> None:
    session = pipe.session("a")
    assert (session.state, session.index) == ("open", 0)
    assert [session.first_frame(chunk) for chunk in range(4)] == [0, 9, 21, 33]
    session.cancel()
    assert session.state == "cancelled"
    with pytest.raises(SessionCancelledError):
        session.flush()
    session.close()
    assert session.state == "closed"


def test_health_and_stages(make_bundle: MakeBundle) -> None:
    stages: list[str] = []
    with Pipeline.load(make_bundle(), sessions=2, threads=1, progress=stages.append) as pipe:
        assert stages == ["files", "engines", "golden", "warmup", "ready"]
        health = pipe.health()
        assert (health.alive, health.sessions, health.open, health.waiting) == (True, 2, 0, 0)
        with pipe.session("a"):
            assert pipe.health().open == 1
    assert not pipe.health().alive
