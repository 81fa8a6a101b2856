from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.frame_table import FrameTable, LatentRing


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int]:
    """(chunk frames, sink frames, slots)."""
    slots = draw(st.integers(0, 12))
    return draw(st.integers(1, 4)), draw(st.integers(0, min(4, slots))), slots


def naive_residents(chunks: int, chunk_frames: int, sinks: int, capacity: int) -> list[int]:
    """Resident frames after committing `chunks` chunks: append everything, delete the oldest non-sink."""
    resident: list[int] = []
    for chunk in range(chunks):
        resident += [chunk * chunk_frames + i for i in range(chunk_frames)]
        while len(resident) > capacity:
            oldest = min(frame for frame in resident if frame >= sinks)
            resident.remove(oldest)
    return resident


@given(shape=shapes(), chunks=st.integers(0, 12), first_slot=st.integers(0, 50))
def test_eviction_order_against_a_list(shape: tuple[int, int, int], chunks: int, first_slot: int) -> None:
    chunk_frames, sinks, capacity = shape
    own = range(first_slot, first_slot + capacity)
    table = FrameTable(own, chunk_frames=chunk_frames, sink_frames=sinks)
    stored: dict[int, int] = {}  # slot -> frame, what the engine's memory would hold
    for chunk in range(chunks):
        assert table.begin() == chunk == table.in_flight
        before = table.frames
        for move in table.commit():
            assert move.frame == chunk * chunk_frames + move.offset
            stored[move.slot] = move.frame
        assert set(table.frames) <= set(before) | set(range(chunk * chunk_frames, (chunk + 1) * chunk_frames))
    expected = naive_residents(chunks, chunk_frames, sinks, capacity)
    assert list(table.frames) == expected
    slots = table.frame_slots()
    assert len(slots) == capacity
    assert [stored[slot] for slot in slots[: len(expected)]] == expected
    assert slots[len(expected) :] == (-1,) * (capacity - len(expected))
    assert set(stored) <= set(own)
    assert [stored[slot] for slot in table.sink_slots()] == [frame for frame in expected if frame < sinks]
    assert list(table.resident_chunks()) == sorted({frame // chunk_frames for frame in expected})
    for chunk in range(chunks):
        mine = [frame for frame in expected if frame // chunk_frames == chunk]
        assert [move.frame for move in table.moves(chunk, sinks=True)] == mine
        assert [move.frame for move in table.moves(chunk, sinks=False)] == [f for f in mine if f >= sinks]
        older = [frame for frame in expected if frame < chunk * chunk_frames]
        visible = table.frame_slots(before=chunk * chunk_frames)
        assert [stored[slot] for slot in visible if slot >= 0] == older
        assert len(visible) == capacity


@given(
    shape=shapes(),
    switches=st.lists(st.sampled_from(["", "", "flush", "cut"]), max_size=12),
    keep=st.integers(0, 4),
)
def test_flushes_and_cuts_against_a_list(shape: tuple[int, int, int], switches: list[str], keep: int) -> None:
    chunk_frames, sinks, capacity = shape
    table = FrameTable(range(capacity), chunk_frames=chunk_frames, sink_frames=sinks)
    resident: list[int] = []
    positions: list[int] = []  # of every frame that was ever begun
    position = 0
    for chunk, switch in enumerate(switches):
        if switch:
            recent = [frame for frame in resident if frame >= sinks]
            gone = recent[: len(recent) - min(keep, len(recent))]
            resident = [frame for frame in resident if frame not in gone]
            table.flush(keep)
        if switch == "cut":
            table.jump(7)
            position += 7 if len(positions) >= sinks else 0
        assert table.begin() == chunk
        for _ in range(chunk_frames):
            resident.append(len(positions))
            positions.append(position)
            position += 1
        table.commit()
        while len(resident) > capacity:
            resident.remove(min(frame for frame in resident if frame >= sinks))
        assert list(table.frames) == resident
        assert [table.position(frame) for frame in range(len(positions))] == positions
        assert len({slot for slot in table.frame_slots() if slot >= 0}) == len(resident)
        again = FrameTable(range(5, 5 + capacity), chunk_frames=chunk_frames, sink_frames=sinks)
        again.restore(5, table.state(0))
        assert (again.frames, again.sink_shift()) == (table.frames, table.sink_shift())
        assert again.position(len(positions)) == position


@given(
    chunk_frames=st.integers(1, 4),
    sinks=st.integers(0, 3),
    persistent=st.integers(1, 5),
    more=st.integers(0, 4),
    events=st.lists(st.sampled_from(["", "", "", "", "flush", "forget", "restored"]), max_size=14),
)
def test_virtual_frames_against_lists(
    chunk_frames: int, sinks: int, persistent: int, more: int, events: list[str]
) -> None:
    """What memory would hold: frames as they were, and virtual ones by the order in which their slots became that."""
    recent_frames = chunk_frames + more
    capacity = sinks + persistent + recent_frames

    def made() -> FrameTable:
        return FrameTable(
            range(7, 7 + capacity), chunk_frames=chunk_frames, sink_frames=sinks, persistent_frames=persistent
        )

    table = made()
    stored: dict[int, object] = {}
    resident: list[int] = []
    virtual: list[str] = []
    newest_gone = -1
    for chunk, event in enumerate(events):
        if event == "flush":
            recent = [frame for frame in resident if frame >= sinks]
            resident = [frame for frame in resident if frame < sinks] + recent[-2:]
            table.flush(2)
        elif event == "forget":
            table.forget_persistent()
        elif event == "restored":
            state, table = table.state(7), made()
            table.restore(7, state)
        if event in ("flush", "forget"):
            virtual = []
        assert table.begin() == chunk
        own = list(range(chunk * chunk_frames, (chunk + 1) * chunk_frames))
        frames = resident + own
        leaving = [frame for frame in resident if frame >= sinks][
            : max(0, len(frames) - sinks - recent_frames)
        ]
        kept, evicted = table.contest()
        assert kept == min(persistent, len(virtual) + len(leaving))
        assert kept + evicted == len(virtual) + len(leaving)
        # The candidates are the frames behind the sinks.
        present = len([frame for frame in resident if frame < sinks])
        contested = [stored[slot] for slot in table.frame_slots()[present : present + kept + evicted]]
        assert contested == [*virtual, *leaving]
        for index, slot in enumerate(table.frame_slots()[present : present + kept]):
            stored[slot] = f"virtual of chunk {chunk}, {index}"
        virtual = [f"virtual of chunk {chunk}, {index}" for index in range(kept)]
        newest_gone = max([newest_gone, *leaving])
        for move in table.commit():
            stored[move.slot] = move.frame
        resident = [frame for frame in frames if frame not in leaving]
        slots = [stored[slot] for slot in table.frame_slots() if slot >= 0]
        first = [frame for frame in resident if frame < sinks]
        assert slots == [*first, *virtual, *resident[len(first) :]]
        assert table.pinned() == len(first) + len(virtual)
        for before in range(0, resident[-1] + 1, chunk_frames):
            older = [frame for frame in resident if frame < before]
            seen = virtual if before > newest_gone else []
            pinned = [frame for frame in older if frame < sinks]
            visible = [stored[slot] for slot in table.frame_slots(before) if slot >= 0]
            assert visible == [*pinned, *seen, *older[len(pinned) :]]
            assert table.pinned(before) == len(pinned) + len(seen)


def test_a_table_of_another_set_is_not_restored() -> None:
    table = FrameTable(range(9), chunk_frames=3, sink_frames=0, persistent_frames=3)
    for _ in range(4):
        table.begin()
        table.commit()
    with pytest.raises(ValueError, match="not those of a table of 9"):
        FrameTable(range(9), chunk_frames=3, sink_frames=0).restore(0, table.state(0))


def test_light_forcing_long_window() -> None:
    """1 sink + 8 recent + 3 current: the sink moves up as the window slides."""
    table = FrameTable(range(9), chunk_frames=3, sink_frames=1)
    shifts, frames = [], []
    for _ in range(5):
        table.begin()
        table.commit()
        shifts.append(table.sink_shift())
        frames.append(table.frames)
    assert frames[2] == (0, 1, 2, 3, 4, 5, 6, 7, 8)
    assert frames[3] == (0, 4, 5, 6, 7, 8, 9, 10, 11)
    assert frames[4] == (0, 7, 8, 9, 10, 11, 12, 13, 14)
    assert shifts == [0, 0, 0, 3, 6]


def test_sinks_stand_before_the_next_chunk_if_nothing_is_recent() -> None:
    table = FrameTable(range(2), chunk_frames=3, sink_frames=2)
    for expected in (1, 4, 7):  # the next chunk starts at 3, 6, 9
        table.begin()
        table.commit()
        assert table.frames == (0, 1)
        assert table.sink_shift() == expected


def test_no_sinks_no_shift() -> None:
    table = FrameTable(range(3), chunk_frames=3, sink_frames=0)
    for _ in range(4):
        table.begin()
        table.commit()
    assert table.sink_shift() == 0 and table.sink_slots() == ()


def test_one_chunk_in_flight_at_a_time() -> None:
    table = FrameTable(range(3), chunk_frames=3, sink_frames=0)
    with pytest.raises(ValueError, match="no chunk is in flight"):
        table.commit()
    table.begin()
    with pytest.raises(ValueError, match="chunk 0 is still in flight"):
        table.begin()
    with pytest.raises(ValueError, match="do not fit"):
        FrameTable(range(1), chunk_frames=3, sink_frames=2)


@given(shape=shapes(), chunks=st.integers(1, 30))
def test_no_latent_that_is_needed_is_overwritten(shape: tuple[int, int, int], chunks: int) -> None:
    chunk_frames, sinks, capacity = shape
    ring = LatentRing(chunk_frames=chunk_frames, sink_frames=sinks, past_frames=capacity)
    table = FrameTable(range(capacity), chunk_frames=chunk_frames, sink_frames=sinks)
    for chunk in range(chunks):
        if chunk:
            table.commit()
        table.begin()
        # Written: this chunk. Still read: what is resident (a prompt switch), and the one before (being decoded).
        needed = {*table.resident_chunks(), chunk} | ({chunk - 1} if chunk else set())
        slots = [ring.slot(index) for index in needed]
        assert len(set(slots)) == len(slots)
        assert all(0 <= slot < ring.slots for slot in slots)
