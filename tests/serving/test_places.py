"""Places and the queue for them, on a clock of the test's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

import pytest

from serving.errors import BusyError, RequestError
from serving.places import Places, Waiting


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(test: Callable[[Places, Clock], Coroutine[Any, Any, None]], total: int = 2, queue: int = 2) -> None:
    clock = Clock()
    asyncio.run(test(Places(total, queue=queue, clock=clock), clock))


async def hold(places: Places, told: list[Waiting], leave: asyncio.Event, **options: Any) -> str:
    async with places.place(told.append, **options):
        await leave.wait()
    return "left"


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_places_are_given_in_the_order_asked() -> None:
    async def test(places: Places, clock: Clock) -> None:
        leaves = [asyncio.Event() for _ in range(4)]
        told: list[list[Waiting]] = [[] for _ in range(4)]
        tasks = []
        for number in range(4):
            tasks.append(asyncio.create_task(hold(places, told[number], leaves[number])))
            await settle()
        assert (places.taken, places.waiting) == (2, 2)
        assert [[waiting.position for waiting in news] for news in told] == [[], [], [1], [2]]
        leaves[1].set()
        await settle()
        assert (places.taken, places.waiting) == (2, 1)
        assert [waiting.position for waiting in told[3]][-1] == 1
        for leave in leaves:
            leave.set()
        await asyncio.gather(*tasks)
        assert (places.taken, places.waiting) == (0, 0)

    run(test)


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    async def test(places: Places, clock: Clock) -> None:
        leave = asyncio.Event()
        tasks = [asyncio.create_task(hold(places, [], leave, seconds=30.0)) for _ in range(2)]
        await settle()
        clock.now = 10.0
        tasks += [asyncio.create_task(hold(places, [], leave)) for _ in range(2)]
        await settle()
        with pytest.raises(BusyError, match="all 2 places are taken and 2 clients wait") as caught:
            await hold(places, [], leave)
        assert caught.value.retry_after >= 1
        clips = asyncio.create_task(hold(places, [], leave, bounded=False))
        await settle()
        assert places.waiting == 3
        leave.set()
        await asyncio.gather(*tasks, clips)

    run(test)


def test_expected_wait() -> None:
    async def test(places: Places, clock: Clock) -> None:
        leave, told = asyncio.Event(), []
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(places.place(lambda _: None, seconds=30.0))
            await stack.enter_async_context(places.place(lambda _: None, seconds=50.0))
            clock.now = 10.0
            task = asyncio.create_task(hold(places, told, leave))
            await settle()
            assert told == [Waiting(1, 20.0)]
            assert places.wait_for(2) == 40.0
            assert places.wait_for(3) is None  # nothing is known yet of how long somebody stays
        leave.set()
        await task
        # Two were held for 10 s, one for none.
        async with places.place(lambda _: None), places.place(lambda _: None):
            assert places.wait_for(3) == pytest.approx(2 * 20 / 3)

    run(test)


def test_endless_sessions_have_no_expected_end() -> None:
    async def test(places: Places, clock: Clock) -> None:
        async with places.place(lambda _: None):
            assert places.wait_for(1) is None

    run(test, total=1)


@pytest.mark.parametrize("given", [False, True])
def test_whoever_leaves_the_queue_takes_no_place(given: bool) -> None:
    async def test(places: Places, clock: Clock) -> None:
        leave = asyncio.Event()
        holder = asyncio.create_task(hold(places, [], leave))
        await settle()
        waiting = asyncio.create_task(hold(places, [], asyncio.Event()))
        await settle()
        if given:  # the place is given in the same turn in which the waiting is cancelled
            leave.set()
            while not holder.done():
                await asyncio.sleep(0)
                if places.waiting == 0:
                    break
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        leave.set()
        await holder
        assert (places.taken, places.waiting) == (0, 0)
        async with places.place(lambda _: None):
            assert places.taken == 1

    run(test, total=1)


@pytest.mark.parametrize("happens", ["free", "stop"])
def test_whoever_leaves_in_the_turn_in_which_something_happens_takes_no_place(happens: str) -> None:
    """A cancelled task stays in the queue until it runs: nothing can be given to it, nor told."""

    async def test(places: Places, clock: Clock) -> None:
        leaving = asyncio.Event()
        next_leaving = asyncio.Event()
        async with places.place(lambda _: None):
            waiting = asyncio.create_task(hold(places, [], leaving))
            behind = asyncio.create_task(hold(places, [], next_leaving))
            await settle()
            waiting.cancel()
            if happens == "stop":
                places.refuse_all(RequestError("draining", "the server is stopping", status=503))
        with pytest.raises(asyncio.CancelledError):
            await waiting
        if happens == "stop":
            with pytest.raises(RequestError, match="stopping"):
                await behind
        else:
            await settle()
            assert (places.taken, places.waiting) == (1, 0)
            next_leaving.set()
            assert await behind == "left"
        assert (places.taken, places.waiting) == (0, 0)

    run(test, total=1)


def test_everybody_who_waits_is_sent_away() -> None:
    async def test(places: Places, clock: Clock) -> None:
        leave = asyncio.Event()
        holder = asyncio.create_task(hold(places, [], leave))
        await settle()
        waiting = asyncio.create_task(hold(places, [], leave))
        await settle()
        places.refuse_all(RequestError("draining", "the server is stopping", status=503))
        with pytest.raises(RequestError, match="stopping"):
            await waiting
        leave.set()
        assert await holder == "left"
        assert places.taken == 0

    run(test, total=1)
