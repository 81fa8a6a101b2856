"""Sessions and their scheduling: streams, isolation, back-pressure, prompt switches, cancelling, failures."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import (
    CapacityError,
    ClosedError,
    InputError,
    LightForcingError,
    Pipeline,
    Session,
    SessionCancelledError,
    SessionFailedError,
)
from runtime.errors import EngineError
from tests.runtime.conftest import MakeBundle
from tests.runtime.handmade import TEXT_DIM, TEXT_LEN


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Iterator[Pipeline]:
    """Room for two sessions."""
    with Pipeline.load(bundle, sessions=2, threads=1) as pipeline:
        yield pipeline


def clip(pipe: Pipeline, prompt: str, seed: int, chunks: int = 6) -> list[bytes]:
    with pipe.session(prompt, seed=seed) as session:
        return [chunk.frames.tobytes() for chunk in session.stream(chunks=chunks)]


def started(session: Session) -> int:
    """Chunks that have started, seen from outside: the one where a new prompt would apply."""
    return session.set_prompt("a", recache="none")


def settles_at(session: Session, count: int) -> bool:
    """Whether `count` chunks start and then no more."""
    deadline = time.monotonic() + 20
    while started(session) < count and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.05)
    return started(session) == count


def test_five_seconds_are_seven_chunks_and_81_frames(pipe: Pipeline) -> None:
    with pipe.session("a red fox in snow", seed=7) as session:
        stream = session.stream(seconds=5)
        assert (stream.chunks, stream.frames) == (7, 81)
        chunks = list(stream)
    assert [chunk.index for chunk in chunks] == list(range(7))
    assert [len(chunk.frames) for chunk in chunks] == [9] + [12] * 6
    for chunk in chunks:
        assert chunk.frames.dtype == np.uint8 and chunk.frames.shape[1:] == (32, 32, 3)
        assert min(chunk.denoise, chunk.decode, chunk.other) > 0
        assert chunk.latency >= chunk.denoise + chunk.decode


@pytest.mark.parametrize(
    ("seconds", "chunks"), [(0.01, 1), (9 / 16, 1), (10 / 16, 2), (21 / 16, 2), (15, 21), (60, 81)]
)
def test_seconds_round_up_to_whole_chunks(pipe: Pipeline, seconds: float, chunks: int) -> None:
    with pipe.session("a") as session:
        assert session.stream(seconds=seconds).chunks == chunks


@pytest.mark.parametrize(
    "length",
    [
        {"seconds": 0},
        {"seconds": -1.0},
        {"seconds": float("nan")},
        {"seconds": float("inf")},
        {"seconds": "5"},
        {"chunks": 0},
        {"chunks": 2.5},
        {"seconds": 1, "chunks": 1},
    ],
)
def test_unusable_length(pipe: Pipeline, length: dict[str, Any]) -> None:
    with pipe.session("a") as session, pytest.raises(InputError, match=r"seconds|chunks"):
        session.stream(**length)


def test_same_seed_same_bits_and_other_seed_or_prompt_others(pipe: Pipeline) -> None:
    first = clip(pipe, "a red fox", 7)
    assert clip(pipe, "a red fox", 7) == first
    assert clip(pipe, "a red fox", 8) != first
    assert clip(pipe, "a red sea", 7) != first


def test_prompt_and_its_embedding_are_the_same(pipe: Pipeline) -> None:
    with pipe.session(embedding=pipe.embed("a red fox"), seed=7) as session:
        frames = [chunk.frames.tobytes() for chunk in session.stream(chunks=3)]
    assert frames == clip(pipe, "a red fox", 7, chunks=3)


def test_sessions_side_by_side_equal_each_alone(pipe: Pipeline) -> None:
    alone = [clip(pipe, "a red fox", 1), clip(pipe, "snow in sea", 2)]
    with pipe.session("a red fox", seed=1) as one, pipe.session("snow in sea", seed=2) as two:
        pairs = zip(one.stream(chunks=6), two.stream(chunks=6), strict=True)
        together = [(a.frames.tobytes(), b.frames.tobytes()) for a, b in pairs]
    assert together == list(zip(*alone, strict=True))


def test_sessions_on_threads_of_their_own_equal_each_alone(pipe: Pipeline) -> None:
    alone = [clip(pipe, "a red fox", seed, chunks=12) for seed in (1, 2)]
    together: dict[int, list[bytes]] = {}
    threads = [
        threading.Thread(
            target=lambda seed=seed: together.update({seed: clip(pipe, "a red fox", seed, chunks=12)})
        )
        for seed in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [together[1], together[2]] == alone


def test_sessions_take_turns_by_chunk(bundle: Path) -> None:
    with Pipeline.load(bundle, sessions=2, threads=1) as pipe:
        order: list[tuple[str, int]] = []

        def run(name: str) -> None:
            with pipe.session("a") as session:
                barrier.wait()
                for chunk in session.stream(chunks=40):
                    order.append((name, chunk.index))

        barrier = threading.Barrier(2)
        threads = [threading.Thread(target=run, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    # Neither finishes long before the other: at half time both have had their share.
    half = [name for name, _ in order[:40]]
    assert 10 <= half.count("a") <= 30


def test_two_consumers_share_a_session(pipe: Pipeline) -> None:
    whole = clip(pipe, "a", 1, chunks=12)
    with pipe.session("a", seed=1) as session, ThreadPoolExecutor(2) as pool:
        streams = [session.stream(chunks=8), session.stream(chunks=12)]
        taken = list(pool.map(list, streams))
    chunks = sorted(taken[0] + taken[1], key=lambda chunk: chunk.index)
    assert [chunk.frames.tobytes() for chunk in chunks] == whole


def test_waiting_costs_no_processor_time(bundle: Path) -> None:
    """Two consumers wait while nothing can be done for them: a worker is held up in one rollout."""
    with Pipeline.load(bundle, sessions=3, threads=1) as pipe:
        held = threading.Event()
        streams = [pipe.session("a").stream() for _ in range(3)]
        rollout = streams[0]._lane.rollout
        advance = rollout.advance
        rollout.advance = lambda *arguments: (held.wait(30), advance(*arguments))[1]  # type: ignore[method-assign]
        threads = [threading.Thread(target=next, args=(stream,)) for stream in streams]
        for thread in threads:
            thread.start()
            time.sleep(0.05)  # the first one gets to the worker first
        before = time.process_time()
        time.sleep(0.3)
        spent = time.process_time() - before
        held.set()
        for thread in threads:
            thread.join(30)
    assert spent < 0.1


def test_frames_belong_to_the_caller(pipe: Pipeline) -> None:
    with pipe.session("a", seed=1) as session:
        chunks = list(session.stream(chunks=4))
    for chunk in chunks:
        assert chunk.frames.flags.owndata and chunk.frames.flags.writeable
    kept = chunks[0].frames.tobytes()
    chunks[1].frames.fill(0)
    assert clip(pipe, "a", 1, chunks=1) == [kept]


def test_at_most_one_chunk_ahead(pipe: Pipeline) -> None:
    with pipe.session("a") as session:
        stream = session.stream()
        assert stream.chunks is None and stream.frames is None
        assert settles_at(session, 0)  # nothing starts before it is asked for
        for index in range(4):
            assert next(stream).index == index
            assert settles_at(session, index + 2)


def test_nothing_starts_after_the_last_chunk(pipe: Pipeline) -> None:
    with pipe.session("a") as session:
        assert len(list(session.stream(chunks=3))) == 3
        assert settles_at(session, 3)


def test_streams_follow_each_other(pipe: Pipeline) -> None:
    whole = clip(pipe, "a red fox", 3, chunks=9)
    with pipe.session("a red fox", seed=3) as session:
        parts = [chunk.frames.tobytes() for chunk in session.stream(chunks=2)]
        for chunk in session.stream():  # left early, with a chunk under way
            parts.append(chunk.frames.tobytes())
            if chunk.index == 4:
                break
        later = session.stream(seconds=2)
        assert (later.chunks, later.frames) == (3, 36)  # not the first chunk any more: 12 frames each
        parts += [chunk.frames.tobytes() for chunk in later]
        assert parts == whole[:8]
        assert list(later) == []


def test_set_prompt_tells_where_it_applies(pipe: Pipeline) -> None:
    with pipe.session("a red fox", seed=3) as session:
        frames, applies = [], None
        for chunk in session.stream(chunks=8):
            frames.append(chunk.frames.tobytes())
            if chunk.index == 2:
                applies = session.set_prompt("the fox jumps")
    assert applies in (3, 4)
    with pipe.session("a red fox", seed=3) as session:
        assert session.set_prompt("the fox jumps", at=applies) == applies
        assert [chunk.frames.tobytes() for chunk in session.stream(chunks=8)] == frames
    plain = clip(pipe, "a red fox", 3, chunks=8)
    assert frames[:applies] == plain[:applies] and frames[applies] != plain[applies]


def test_set_prompt_refuses_a_chunk_that_has_started(pipe: Pipeline) -> None:
    with pipe.session("a") as session:
        list(session.stream(chunks=3))
        with pytest.raises(
            InputError, match="chunk 2 has already started; the first that can still change is 3"
        ):
            session.set_prompt("snow", at=2)
        assert session.set_prompt("snow", at=3) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"prompt": "a", "recache": "some"},
            "recache is 'some'; expected one of window, all, none, flush, cut",
        ),
        ({"prompt": "a", "at": -1}, "at is -1"),
        ({"prompt": "a", "at": 1.5}, "at is 1.5"),
        ({}, "found neither"),
        ({"prompt": "a", "embedding": np.zeros((TEXT_LEN, TEXT_DIM))}, "found both"),
        ({"prompt": 7}, "prompt is a int"),
        ({"embedding": np.zeros((1, 2))}, r"embedding has shape \(1, 2\); expected \(6, 8\)"),
    ],
)
def test_unusable_prompt_switch(pipe: Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pipe.session("a") as session, pytest.raises(InputError, match=message):
        session.set_prompt(**arguments)


def test_admission_says_what_is_needed(pipe: Pipeline) -> None:
    with pipe.session("a"), pipe.session("a") as second:
        with pytest.raises(
            CapacityError, match=r"all 2 session\(s\) .* are open: another needs .* 0 are free"
        ) as caught:
            pipe.session("a")
        assert (caught.value.needed, caught.value.free) == (pipe.memory.session_bytes, 0)
        second.close()
        second.close()  # gives its place back once
        with pipe.session("a"), pytest.raises(CapacityError):
            pipe.session("a")


def test_a_refused_session_takes_no_place(pipe: Pipeline) -> None:
    for _ in range(3):
        with pytest.raises(InputError):
            pipe.session("a", seed=-1)
        with pytest.raises(InputError):
            pipe.session()
    with pipe.session("a"), pipe.session("a"):
        pass


def test_a_session_that_the_device_refuses_takes_no_place(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(session: int) -> None:
        raise EngineError("cuMemsetD8Async failed")

    with monkeypatch.context() as patch:
        patch.setattr(pipe.engine, "reset", refuse)
        for _ in range(3):
            with pytest.raises(EngineError, match="cuMemsetD8Async"):
                pipe.session("a")
    with pipe.session("a"), pipe.session("a"):
        pass


def test_cancel_from_another_thread(pipe: Pipeline) -> None:
    with pipe.session("a") as session:
        seen = []

        def consume() -> None:
            with pytest.raises(SessionCancelledError):
                for chunk in session.stream():
                    seen.append(chunk.index)

        thread = threading.Thread(target=consume)
        thread.start()
        while len(seen) < 3:
            time.sleep(0.001)
        session.cancel()
        thread.join(30)
        assert not thread.is_alive()
        with pytest.raises(SessionCancelledError):
            next(session.stream(chunks=1))
        with pytest.raises(SessionCancelledError):
            session.set_prompt("snow")
    assert len(clip(pipe, "a", 0, chunks=2)) == 2


def test_closing_wakes_whoever_waits(bundle: Path) -> None:
    with Pipeline.load(bundle, threads=1) as pipe:
        session = pipe.session("a")
        stream = session.stream()
        next(stream)
        errors: list[Exception] = []

        def consume() -> None:
            try:
                for _ in stream:
                    pass
            except LightForcingError as error:
                errors.append(error)

        thread = threading.Thread(target=consume)
        thread.start()
        time.sleep(0.05)
    thread.join(30)
    assert [type(error) for error in errors] == [ClosedError]
    session.close()
    with pytest.raises(ClosedError, match="the session is closed"):
        next(stream)
    with pytest.raises(ClosedError, match="the pipeline is closed"):
        pipe.session("a")
    pipe.close()


def test_failure_ends_the_session_and_not_the_pipeline(make_bundle: MakeBundle) -> None:
    with Pipeline.load(make_bundle(fail_at_chunk=3), sessions=2, threads=1) as pipe:
        healthy = pipe.session("a", seed=1)
        with pipe.session("a", seed=1) as session:
            stream = session.stream()
            assert [next(stream).index for _ in range(3)] == [0, 1, 2]  # finished chunks still come
            with pytest.raises(
                SessionFailedError, match=r"chunk 3 failed: component 'step' failed"
            ) as caught:
                next(stream)
            assert isinstance(caught.value.__cause__, EngineError)
            for action in (lambda: next(stream), lambda: session.set_prompt("snow")):
                with pytest.raises(SessionFailedError):
                    action()
        assert len(list(healthy.stream(chunks=3))) == 3
        healthy.close()
        assert len(clip(pipe, "a", 1, chunks=3)) == 3


def test_nothing_is_delivered_past_a_chunk_whose_decoding_failed(
    pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next chunk was on its way already; its frames would come after a gap, from caches that lack one chunk."""
    decode, calls, queued = pipe.engine.decode, [0], threading.Event()
    waiting = pipe._scheduler._decodings

    def fail_once(session: int, latent: int, **options: Any) -> float:
        calls[0] += 1
        if calls[0] == 2:
            assert holds(lambda: len(waiting) == 1)
            queued.set()
            raise EngineError("no memory for these frames")
        return decode(session, latent, **options)

    monkeypatch.setattr(pipe.engine, "decode", fail_once)
    with pipe.session("a") as session:
        stream = session.stream()
        assert next(stream).index == 0
        with pytest.raises(SessionFailedError, match="chunk 1 failed: no memory"):
            next(stream)
        assert queued.is_set() and holds(lambda: not waiting)
        time.sleep(0.05)
        with pytest.raises(SessionFailedError, match="chunk 1 failed: no memory"):
            next(stream)


def holds(condition: Callable[[], bool]) -> bool:
    """Whether a condition holds within a while."""
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    return condition()


def test_async_iteration_equals_sync(pipe: Pipeline) -> None:
    async def collect(session: Session) -> list[bytes]:
        frames = []
        async for chunk in session.stream(chunks=6):
            frames.append(chunk.frames.tobytes())
            await asyncio.sleep(0)
        return frames

    async def both() -> list[list[bytes]]:
        with pipe.session("a red fox", seed=1) as one, pipe.session("snow", seed=2) as two:
            return await asyncio.gather(collect(one), collect(two))

    assert asyncio.run(both()) == [clip(pipe, "a red fox", 1), clip(pipe, "snow", 2)]


def test_an_abandoned_await_loses_no_chunk(pipe: Pipeline) -> None:
    async def run() -> list[int]:
        with pipe.session("a", seed=1) as session:
            stream = session.stream(chunks=5)
            task = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return [chunk.index async for chunk in stream]

    assert asyncio.run(run()) == [0, 1, 2, 3, 4]


def test_async_failure_and_cancel_surface(make_bundle: MakeBundle) -> None:
    async def run() -> None:
        with Pipeline.load(make_bundle(fail_at_chunk=3), threads=1) as pipe:
            with pipe.session("a") as session, pytest.raises(SessionFailedError):
                async for _ in session.stream():
                    pass
            with pipe.session("a") as session:
                stream = session.stream()
                await anext(stream)
                session.cancel()
                with pytest.raises(SessionCancelledError):
                    await anext(stream)

    asyncio.run(run())


def test_memory_is_checked_before_anything_is_allocated(bundle: Path) -> None:
    with pytest.raises(
        CapacityError, match=r"1 session\(s\) of 'handmade' need [\d,]+ bytes .* but 1,000 are free"
    ) as caught:
        Pipeline.load(bundle, memory_limit=1000)
    assert caught.value.free == 1000
    needed = caught.value.needed
    with pytest.raises(CapacityError):
        Pipeline.load(bundle, memory_limit=needed - 1)
    Pipeline.load(bundle, memory_limit=needed, threads=1).close()


@pytest.mark.parametrize(
    "options",
    [
        {"sessions": 0},
        {"sessions": 1.5},
        {"threads": 0},
        {"threads": 100_000},
        {"text_encoder": "gpu"},
        {"device": -1},
        {"device": "cuda:0"},
        {"device": 1},  # the bundle runs on the CPU
    ],
)
def test_unusable_load_options(bundle: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        Pipeline.load(bundle, **options)


def test_external_text_encoder_takes_embeddings_only(bundle: Path) -> None:
    with Pipeline.load(bundle, text_encoder="external", threads=1, warmup=False) as pipe:
        with pytest.raises(InputError, match="pass embedding= instead of a prompt"):
            pipe.session("a")
        with pipe.session(embedding=np.zeros((TEXT_LEN, TEXT_DIM))) as session:
            assert len(list(session.stream(chunks=2))) == 2


def test_workers_end_with_the_pipeline(bundle: Path) -> None:
    before = threading.active_count()
    for _ in range(3):
        with Pipeline.load(bundle, threads=1, warmup=False) as pipe:
            next(pipe.session("a").stream())  # left open, with work under way
        gc.collect()
    assert threading.active_count() == before
