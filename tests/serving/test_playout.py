"""The clock of a client's screen, without a client."""

from __future__ import annotations

import pytest

from serving.live.playout import Playout

CHUNK = 0.75


@pytest.fixture
def playout() -> Playout:
    """Chunk 0 was sent at 10 s and shown at once."""
    playout = Playout()
    assert playout.sent(0, CHUNK, 10.0) == 0.0
    assert playout.queued(10.0)
    playout.acknowledged(0, 10.02)
    assert not playout.queued(10.02)
    return playout


def test_one_chunk_may_be_queued(playout: Playout) -> None:
    playout.sent(1, CHUNK, 10.1)
    assert playout.queued(10.1) and playout.queued(10.7)
    playout.acknowledged(1, 10.8)
    assert not playout.queued(10.8)


def test_acknowledgements_of_other_chunks_change_nothing(playout: Playout) -> None:
    playout.sent(1, CHUNK, 10.1)
    playout.acknowledged(0, 10.8)
    playout.acknowledged(2, 10.8)
    assert playout.queued(10.8)


def test_a_client_that_claims_to_be_ahead_of_time_is_not_believed(playout: Playout) -> None:
    for chunk in range(1, 40):
        playout.sent(chunk, CHUNK, playout.begins)
        playout.acknowledged(chunk, playout.begins - CHUNK)
        assert playout.queued(playout.begins - 0.001)
    # 39 chunks take 39 chunks' time, less what a clock may be fast.
    assert playout.begins - 10.02 >= 0.85 * 39 * CHUNK


def test_deadline_of_the_next_chunk(playout: Playout) -> None:
    assert playout.deadline(CHUNK) == pytest.approx(10.02 + CHUNK + 0.5)
    playout.sent(1, CHUNK, 10.1)
    assert playout.deadline(CHUNK) == pytest.approx(10.02 + 2 * CHUNK + 0.5)
    playout.dropped(CHUNK)
    assert playout.deadline(CHUNK) == pytest.approx(10.02 + 3 * CHUNK + 0.5)


def test_a_late_chunk_is_a_stall_and_moves_the_clock(playout: Playout) -> None:
    assert playout.sent(1, CHUNK, 12.0) == pytest.approx(12.0 - (10.02 + CHUNK))
    assert playout.begins == 12.0


def test_a_pause_is_no_stall(playout: Playout) -> None:
    playout.sent(1, CHUNK, 10.1)
    playout.paused(5.0, 15.5)
    assert playout.silent_for(15.6) == pytest.approx(0.1)
    playout.acknowledged(1, 10.02 + CHUNK + 5.0)
    assert playout.sent(2, CHUNK, 10.02 + CHUNK + 5.3) == 0.0


def test_after_a_flush_the_next_chunk_may_go_at_once_and_is_no_stall(playout: Playout) -> None:
    playout.sent(1, CHUNK, 10.1)
    playout.flush()
    assert not playout.queued(10.2)
    assert playout.silent_for(20.0) == 0.0
    assert playout.sent(4, CHUNK, 13.0) == 0.0
    assert playout.queued(13.0)


def test_silence_counts_only_while_something_should_be_shown(playout: Playout) -> None:
    assert playout.silent_for(30.0) == 0.0  # it has begun all that it was sent
    playout.sent(1, CHUNK, 30.0)
    assert playout.silent_for(31.0) > 0.0


def test_how_early_the_engine_is_asked() -> None:
    playout = Playout()
    assert playout.eager  # nothing is known yet
    playout.measured(0.1, CHUNK)
    assert not playout.eager
    playout.sent(0, CHUNK, 0.0)
    playout.measured(0.7, CHUNK)
    assert playout.eager
    for _ in range(7):
        playout.measured(0.1, CHUNK)
        assert playout.eager  # it was late once, so it has to show itself for a while
    playout.measured(0.1, CHUNK)
    assert not playout.eager
