"""Bookkeeping of the frame cache, in plain Python: no arrays, no model.

    [ sink frames | ring of recent frames | in-flight chunk ]

A session owns a fixed set of physical *slots*, each holding one frame's keys and values in every layer. The
table maps frames (absolute index from the start of the rollout) to slots; eviction changes the table and never
copies. The chunk in flight lives in the engine's staging buffers until it is committed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ABSENT", "FrameTable", "LatentRing", "Move", "TableState"]

ABSENT = -1
"""Entry of `frame_slots` that stands for no frame."""


@dataclass(frozen=True)
class Move:
    """Commit frame `offset` of the in-flight chunk to `slot`; `frame` is its absolute index."""

    offset: int
    slot: int
    frame: int


@dataclass(frozen=True)
class TableState:
    """What a `FrameTable` holds: frames with their slots, oldest first, and free slots in the order of use."""

    next_chunk: int
    in_flight: int | None
    slots: tuple[tuple[int, int], ...]
    free: tuple[int, ...]
    jumps: tuple[tuple[int, int], ...] = ()
    """Frames from which on positions in time are further on than their number, and by how much."""
    persistent: tuple[int, ...] = ()
    """Slots of virtual frames, in order."""
    gone: int = 0
    """Virtual frames hold blocks of frames below this one."""


class FrameTable:
    """Which frame of one session lies in which slot.

    Frames below `sink_frames` are never evicted; of the others the oldest goes first. There is one chunk in
    flight at a time: `begin`, then `commit` once its clean keys and values exist.

    With `persistent_frames`, so many slots are for virtual frames, which come behind the sinks. The first frames that
    are evicted become virtual as they are; once there are enough, blocks of those that follow take places in them
    (`contest`).
    """

    def __init__(
        self, slots: Sequence[int], *, chunk_frames: int, sink_frames: int, persistent_frames: int = 0
    ) -> None:
        if sink_frames > len(slots):
            raise ValueError(f"{sink_frames} sink frames do not fit into {len(slots)} slots")
        self._capacity = len(slots)
        self._persistent_frames = persistent_frames
        self._persistent: list[int] = []
        self._gone = 0
        self._chunk_frames = chunk_frames
        self._sink_frames = sink_frames
        self._free = list(slots)
        self._slots: dict[int, int] = {}  # frame -> slot; insertion order is oldest first
        self._next = 0
        self._in_flight: int | None = None
        self._jumps: list[tuple[int, int]] = []

    @property
    def next_chunk(self) -> int:
        """Index of the chunk that `begin` starts next."""
        return self._next

    @property
    def in_flight(self) -> int | None:
        """Index of the chunk begun and not yet committed."""
        return self._in_flight

    @property
    def frames(self) -> tuple[int, ...]:
        """Committed frames that are resident, oldest first."""
        return tuple(self._slots)

    def begin(self) -> int:
        """Put the next chunk in flight and return its index.

        Raises:
            ValueError: a chunk is in flight already.
        """
        if self._in_flight is not None:
            raise ValueError(f"chunk {self._in_flight} is still in flight; commit it first")
        self._in_flight = self._next
        self._next += 1
        return self._in_flight

    def state(self, first_slot: int) -> TableState:
        """What the table holds, its slots counted from `first_slot`."""
        return TableState(
            self._next,
            self._in_flight,
            tuple((frame, slot - first_slot) for frame, slot in self._slots.items()),
            tuple(slot - first_slot for slot in self._free),
            tuple(self._jumps),
            tuple(slot - first_slot for slot in self._persistent),
            self._gone,
        )

    def restore(self, first_slot: int, state: TableState) -> None:
        """Be as the table was that gave `state`.

        Raises:
            ValueError: the state is of a table of another size.
        """
        held = [*(slot for _, slot in state.slots), *state.persistent, *state.free]
        if sorted(held) != list(range(self._capacity)) or len(state.persistent) > self._persistent_frames:
            raise ValueError(f"its slots are not those of a table of {self._capacity}")
        self._slots = {frame: slot + first_slot for frame, slot in state.slots}
        self._free = [slot + first_slot for slot in state.free]
        self._next, self._in_flight = state.next_chunk, state.in_flight
        self._jumps = list(state.jumps)
        self._persistent = [slot + first_slot for slot in state.persistent]
        self._gone = state.gone

    def commit(self) -> tuple[Move, ...]:
        """Make the in-flight chunk's frames resident, evicting the oldest; say which frame goes where.

        Where the window is shorter than a chunk, only the chunk's last frames (and sinks) become resident.

        Raises:
            ValueError: no chunk is in flight.
        """
        if self._in_flight is None:
            raise ValueError("no chunk is in flight; begin one first")
        first = self._in_flight * self._chunk_frames
        new = range(first, first + self._chunk_frames)
        frames = [*self._slots, *new]
        recent = [frame for frame in frames if frame >= self._sink_frames]
        evicted = set(recent[: self._overflow(len(new))])
        for frame in [frame for frame in self._slots if frame in evicted]:
            room = self._persistent if len(self._persistent) < self._persistent_frames else self._free
            room.append(self._slots.pop(frame))
            self._gone = frame + 1
        moves = []
        for frame in new:
            if frame not in evicted:
                slot = self._free.pop(0)
                self._slots[frame] = slot
                moves.append(Move(offset=frame - first, slot=slot, frame=frame))
        self._in_flight = None
        return tuple(moves)

    def _overflow(self, frames: int) -> int:
        """How many frames leave where so many come."""
        return max(0, len(self._slots) + frames - (self._capacity - self._persistent_frames))

    def contest(self) -> tuple[int, int]:
        """What `commit` of the chunk in flight makes compete, of the frames behind the sinks, oldest first.

        The first number says how many of them are virtual from then on, the second how many behind these leave: blocks
        of theirs may take places in the others before.
        """
        candidates = len(self._persistent) + self._overflow(self._chunk_frames)
        kept = min(candidates, self._persistent_frames)
        return kept, candidates - kept

    def flush(self, keep: int) -> None:
        """Forget every frame but the sinks and the latest `keep`."""
        recent = [frame for frame in self._slots if frame >= self._sink_frames]
        for frame in recent[: max(0, len(recent) - keep)]:
            self._free.append(self._slots.pop(frame))
        self.forget_persistent()

    def forget_persistent(self) -> None:
        """Forget the virtual frames."""
        self._free += self._persistent
        self._persistent.clear()

    def jump(self, frames: int) -> None:
        """Move what is begun from now on by so many frames in time; nothing happens before there are all sinks."""
        first = self._next * self._chunk_frames
        if first >= self._sink_frames:
            self._jumps.append((first, frames))

    def position(self, frame: int) -> int:
        """Where a frame lies in time."""
        return frame + sum(distance for first, distance in self._jumps if frame >= first)

    def frame_slots(self, before: int | None = None) -> tuple[int, ...]:
        """Slots of the resident frames (those below frame `before`), oldest first, padded with -1.

        Virtual frames come behind the sinks, unless they may hold blocks of frames that are not below `before`.
        """
        pinned, recent = self._seen(before)
        present = pinned + recent
        return tuple(present + [ABSENT] * (self._capacity - len(present)))

    def slots_of(self, frames: Sequence[int]) -> tuple[int, ...]:
        """Slots of some resident frames, in their order."""
        return tuple(self._slots[frame] for frame in frames)

    def pinned(self, before: int | None = None) -> int:
        """How many of `frame_slots` are those of sinks and virtual frames."""
        return len(self._seen(before)[0])

    def _seen(self, before: int | None) -> tuple[list[int], list[int]]:
        """Slots of sinks and virtual frames, and of the others."""
        pinned: list[int] = []
        recent: list[int] = []
        for frame, slot in self._slots.items():
            if before is None or frame < before:
                (pinned if frame < self._sink_frames else recent).append(slot)
        if before is None or before >= self._gone:
            pinned += self._persistent
        return pinned, recent

    def moves(self, chunk: int, *, sinks: bool) -> tuple[Move, ...]:
        """Where the resident frames of a committed `chunk` lie; `sinks=False` leaves sink frames out."""
        first = chunk * self._chunk_frames
        return tuple(
            Move(offset=frame - first, slot=self._slots[frame], frame=frame)
            for frame in range(first, first + self._chunk_frames)
            if frame in self._slots and (sinks or frame >= self._sink_frames)
        )

    def resident_chunks(self) -> tuple[int, ...]:
        """Chunks with at least one resident frame, oldest first."""
        return tuple(dict.fromkeys(frame // self._chunk_frames for frame in self._slots))

    def sink_slots(self) -> tuple[int, ...]:
        """Slots of the resident sink frames, in order."""
        return tuple(slot for frame, slot in self._slots.items() if frame < self._sink_frames)

    def sink_shift(self) -> int:
        """How far window-relative sinks lie from where they were committed, in frames.

        Sink j then sits at the first recent frame - sinks + j. With no recent frame resident, the next chunk's
        first frame takes its place.
        """
        sinks = len(self.sink_slots())
        recent = next((frame for frame in self._slots if frame >= self._sink_frames), None)
        first = self.position(self._next * self._chunk_frames if recent is None else recent)
        return max(0, first - sinks) if sinks else 0


class LatentRing:
    """Where a session keeps the clean latents of its chunks.

    A prompt switch recomputes keys and values from them, so the latent of every chunk with a resident frame is
    kept, besides the one being written and the one being decoded: chunks that hold sinks for good, the others in
    a ring.
    """

    def __init__(self, *, chunk_frames: int, sink_frames: int, past_frames: int) -> None:
        recent = past_frames - sink_frames
        self._fixed = -(-sink_frames // chunk_frames)
        # A run of frames that starts anywhere in a chunk touches up to one chunk more than its length would fill.
        self._ring = (-(-recent // chunk_frames) + 1 if recent else 0) + 2

    @property
    def slots(self) -> int:
        """Number of latent slots."""
        return self._fixed + self._ring

    def slot(self, chunk: int) -> int:
        """The slot of a chunk's latent."""
        return chunk if chunk < self._fixed else self._fixed + (chunk - self._fixed) % self._ring
