"""An engine made of a program and something that executes it.

Everything that is the same on every device is here: what is fed before which forward, which copies lie between them,
and which side of the decoder's caches is next.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Dtype, Manifest
from runtime.bundle.weights_file import is_finite
from runtime.engine import JointChunk, Placement
from runtime.errors import EngineError, InputError
from runtime.frame_table import ABSENT, Move

from .program import Copy, Program, Queue, View
from .rope import RopeTables

__all__ = ["Executor", "Fetch", "Judged", "ProgramEngine"]


class Fetch(Protocol):
    """A buffer on its way to the host."""

    def into(self, out: NDArray[Any]) -> float:
        """Wait for it and copy it into `out`; the seconds spent waiting for the device."""

    def arrived(self) -> NDArray[Any]:
        """What was fetched, where something that was fetched later in the same queue has arrived: nothing waits.

        It is overwritten when the same is fetched again.
        """


class Executor(Protocol):
    """Executes one program. What is enqueued in one queue runs in order."""

    def feed(self, session: int, forward: str) -> AbstractContextManager[Mapping[str, NDArray[Any]]]:
        """Arrays to fill, by buffer name, with what `forward` is fed; they are sent when the context ends."""

    def send(self, session: int, forward: str, values: Mapping[str, NDArray[Any]]) -> None:
        """Like `feed`, for large arrays that exist already."""

    def run(self, session: int, forward: str) -> float:
        """Enqueue the operations of `forward`; the seconds spent on it."""

    def copy(self, session: int, copy: Copy, queue: Queue) -> None:
        """Enqueue a copy that is part of no forward."""

    def signal(self, session: int, latent: int) -> None:
        """A latent has been written, once what is enqueued in queue `forward` has run."""

    def wait(self, session: int, latent: int) -> None:
        """What is enqueued in queue `decode` from now on runs after the last `signal` of that latent."""

    def fetch(self, session: int, view: View, queue: Queue, index: int = 0) -> Fetch:
        """Enqueue a copy to the host; `index` up to the frames of a chunk tells fetches apart that are under way.

        In queue `decode`, those below that number are for frames, that number is for a latent, and the next one for
        the decoder's witness.
        """

    def read(self, session: int, view: View) -> NDArray[np.uint8]:
        """The bytes of a view, once all that is enqueued has run."""

    def write(self, session: int, view: View, value: NDArray[np.uint8]) -> None:
        """Replace the bytes of a view, likewise."""

    def prepare(self, session: int) -> None:
        """Do what the first run of each forward would do, now; all have run once for some session."""

    def close(self) -> None:
        """Free everything."""


@dataclass(frozen=True)
class Judged:
    """What tells whether a chunk is what it should be: its latent, and a part of the decoder's caches behind it."""

    latent: Fetch
    latent_dtype: Dtype
    decoder: Fetch
    decoder_dtype: Dtype

    def require_finite(self) -> None:
        """Once frames that were fetched later have arrived.

        Raises:
            EngineError: the transformer or the decoder gave numbers that are not finite.
        """
        if not is_finite(np.ascontiguousarray(self.latent.arrived()), self.latent_dtype):
            raise EngineError(
                "the transformer gave a latent that is not finite; its weights or its engine are faulty: run "
                "'python -m runtime verify'"
            )
        if not is_finite(np.ascontiguousarray(self.decoder.arrived()), self.decoder_dtype):
            raise EngineError(
                f"the video decoder gave numbers that are not finite: it overflowed {self.decoder_dtype}, or its "
                "engine is faulty; run 'python -m runtime verify', or build the bundle with another decoder"
            )


class ProgramEngine:
    """Implements `Engine` but for frames that stay on a device, and for components alone."""

    def __init__(self, manifest: Manifest, program: Program, executor: Executor) -> None:
        self._program = program
        self._executor = executor
        self._schedule = manifest.schedule
        self._chunk_frames = manifest.model.chunk_frames
        self._joint_chunks = manifest.joint_chunks
        self._sinks = manifest.cache.sink_frames if "place_sinks" in program.forwards else 0
        self._rope = RopeTables(manifest.model)
        self._witnesses = program.decoder_witnesses
        self._latent = [0] * program.sessions
        self._side = [0] * program.sessions
        self._encoding = threading.Lock()
        self._sending = threading.Lock()  # what is sent passes through memory that all lanes share

    @property
    def program(self) -> Program:
        """What is executed."""
        return self._program

    @property
    def executor(self) -> Executor:
        """What executes it."""
        return self._executor

    def warmup(self) -> None:
        """Run every component but the text encoder's layer once, and get every forward ready for every session."""
        shapes = {name: placed.buffer.shape for name, placed in self._program.buffers.items()}
        placement = Placement(0, 0, (ABSENT,) * shapes["frame_slots"][0], 0)
        self.condition(0, np.zeros(shapes["text"], dtype=np.float32))
        if "encoded" in shapes:
            factor = shapes["video_next"][0]
            size = shapes["video_first"][2:]
            count = 1 + factor * (self._chunk_frames - 1)
            self.encode(0, np.zeros((count, *size, 3), dtype=np.uint8), (0,))
        self.begin(0, placement, np.zeros(shapes["noise"], dtype=np.float32))
        if self._schedule.rolling:
            for count in range(1, self._schedule.window_chunks + 1):
                chunks = [JointChunk(0, 0, ())] * count
                noise = np.zeros(shapes["noise"], dtype=np.float32)
                self.denoise_window(0, 0, chunks, placement.frame_slots, noise)
        else:
            for row in dict.fromkeys((*self._schedule.rows(0), *self._schedule.rows(1))):
                self.denoise(0, row)
        self.begin(0, placement, None)
        self.clean(0)
        for count in range(1, self._joint_chunks + 1):
            self.recache(0, 0, [JointChunk(0, 0, ())] * count, placement.frame_slots)
        first, following = shapes["frames_first"], shapes["frames_next"]
        frames = first[0] + (self._chunk_frames - 1) * following[0]
        self._decode_into(np.empty((frames, *first[1:]), dtype=np.uint8), 0, 0, first=True)
        if "persist" in self._program.forwards:
            self.persist(0, 0, 0)
        self.commit(0, [Move(frame, 0, frame) for frame in range(min(1, len(placement.frame_slots)))])
        if self._sinks:
            self.place_sinks(0, (0,), 1)
        for session in range(self._program.sessions):
            self._executor.prepare(session)
            self.reset(session)

    def reset(self, session: int) -> None:
        """Zero the decoder's caches; everything else is written before it is read."""
        self._executor.run(session, "reset")
        self._side[session] = 0

    def condition(self, session: int, embedding: NDArray[np.float32]) -> float:
        """See `Engine.condition`."""
        with self._executor.feed(session, "condition") as arrays:
            np.copyto(arrays["text"], embedding, casting="unsafe")
        return self._executor.run(session, "condition")

    def begin(self, session: int, placement: Placement, noise: NDArray[np.float32] | None) -> None:
        """See `Engine.begin`."""
        forward = "begin_clean" if noise is None else "begin"
        with self._executor.feed(session, forward) as arrays:
            arrays["chunk"][...] = placement.chunk
            arrays["frame_slots"][...] = placement.frame_slots
            if "pinned" in arrays:
                arrays["pinned"][...] = placement.pinned
            self._rope.fill(placement.first_frame, arrays["rope_cos"], arrays["rope_sin"])
            if noise is not None:
                np.copyto(arrays["noise"], noise, casting="unsafe")
        self._latent[session] = placement.latent
        if noise is None:
            self._executor.copy(session, self._program.load_latent(placement.latent), "forward")

    def encode(self, session: int, frames: NDArray[np.uint8], latents: Sequence[int]) -> float:
        """See `Engine.encode`."""
        seconds, begun, side = 0.0, 0, 0
        for number in range(len(latents) * self._chunk_frames):
            name = "video_next" if number else "video_first"
            forward = f"encode_next.{'ab'[side]}" if number else "encode_first"
            side ^= number > 0
            count = self._program.buffers[name].buffer.shape[0]
            pixels = frames[begun : begun + count].transpose(0, 3, 1, 2)
            begun += count
            with self._sending:
                self._executor.send(session, forward, {name: pixels.astype(np.float32) / 127.5 - 1})
            seconds += self._executor.run(session, forward)
            slot, frame = latents[number // self._chunk_frames], number % self._chunk_frames
            self._executor.copy(session, self._program.store_encoded(slot, frame), "forward")
        for slot in latents:
            self._executor.signal(session, slot)
        return seconds

    def denoise(self, session: int, row: int) -> float:
        """See `Engine.denoise`."""
        seconds = self._executor.run(session, f"denoise.{row}")
        if self._schedule.place(row)[1]:
            self._store(session, self._latent[session])
        return seconds

    def denoise_window(
        self,
        session: int,
        chunk: int,
        chunks: Sequence[JointChunk],
        frame_slots: Sequence[int],
        noise: NDArray[np.float32],
    ) -> float:
        """See `Engine.denoise_window`."""
        forward = f"window.{len(chunks)}"
        with self._executor.feed(session, forward) as arrays:
            self._place_together(arrays, chunk, chunks, frame_slots)
            np.copyto(arrays["noise"], noise, casting="unsafe")
        seconds = self._executor.run(session, forward)
        if len(chunks) == self._schedule.window_chunks:
            self._store(session, chunks[0].latent)
        return seconds

    def _store(self, session: int, latent: int) -> None:
        """Keep the clean latent of a chunk that is finished."""
        self._executor.copy(session, self._program.store_latent(latent), "forward")
        self._executor.signal(session, latent)

    def clean(self, session: int) -> float:
        """See `Engine.clean`."""
        return self._executor.run(session, "clean")

    def recache(
        self, session: int, chunk: int, chunks: Sequence[JointChunk], frame_slots: Sequence[int]
    ) -> float:
        """See `Engine.recache`."""
        forward = f"joint.{len(chunks)}"
        with self._executor.feed(session, forward) as arrays:
            self._place_together(arrays, chunk, chunks, frame_slots)
        for number, one in enumerate(chunks):
            self._executor.copy(session, self._program.load_joint_latent(one.latent, number), "forward")
        return self._executor.run(session, forward)

    def _place_together(
        self,
        arrays: Mapping[str, NDArray[Any]],
        chunk: int,
        chunks: Sequence[JointChunk],
        frame_slots: Sequence[int],
    ) -> None:
        arrays["chunk"][...] = chunk
        arrays["frame_slots"][...] = frame_slots
        for number, one in enumerate(chunks):
            self._rope.fill(one.first_frame, arrays[f"joint.{number}.cos"], arrays[f"joint.{number}.sin"])
            if number < len(chunks) - 1:
                _fill_slots(arrays[f"joint.{number}.slots"], one.moves)

    def persist(self, session: int, kept: int, evicted: int) -> None:
        """See `Engine.persist`."""
        with self._executor.feed(session, "persist") as arrays:
            arrays["contest"][...] = kept, evicted
        self._executor.run(session, "persist")

    def commit(self, session: int, moves: Sequence[Move]) -> None:
        """See `Engine.commit`."""
        with self._executor.feed(session, "commit") as arrays:
            _fill_slots(arrays["commit_slots"], moves)
        self._executor.run(session, "commit")
        for chunk in sorted({move.frame // self._chunk_frames for move in moves if move.frame < self._sinks}):
            self._executor.run(session, f"keep_sinks.{chunk}")

    def place_sinks(self, session: int, slots: Sequence[int], shift: int) -> None:
        """See `Engine.place_sinks`."""
        with self._executor.feed(session, "place_sinks") as arrays:
            arrays["sink_slots"].fill(ABSENT)
            arrays["sink_slots"][: len(slots)] = slots
            arrays["sink_cos"][...], arrays["sink_sin"][...] = self._rope.turn(shift)
        self._executor.run(session, "place_sinks")

    def decode(self, session: int, latent: int, *, first: bool, out: NDArray[np.uint8]) -> float:
        """See `Engine.decode`."""
        seconds, judged = self._decode_into(out, session, latent, first=first)
        judged.require_finite()
        return seconds

    def _decode_into(
        self, out: NDArray[np.uint8], session: int, latent: int, *, first: bool
    ) -> tuple[float, Judged]:
        """Decode without judging: before a session begins, buffers hold anything."""
        fetches: list[tuple[Fetch, int]] = []

        def take(buffer: str, count: int, index: int) -> None:
            view = self._program.buffers[buffer].view
            fetches.append((self._executor.fetch(session, view, "decode", index), count))

        seconds, judged = self._decode(session, latent, first, take)
        written = 0
        for fetch, count in fetches:
            seconds += fetch.into(out[written : written + count])
            written += count
        return seconds, judged

    def _decode(
        self, session: int, latent: int, first: bool, take: Callable[[str, int, int], None]
    ) -> tuple[float, Judged]:
        """Run the decoder for each frame of a latent; `take` gets the buffer that then holds so many frames.

        What is to be judged is fetched before the last of them, so that nothing more is waited for.
        """
        self._executor.wait(session, latent)
        seconds = 0.0
        view = self._program.buffers["latents"].view.index(latent)
        written = self._executor.fetch(session, view, "decode", self._chunk_frames)
        for index in range(self._chunk_frames):
            self._executor.copy(session, self._program.decode_latent(latent, index), "decode")
            if first and index == 0:
                forward, frames = "decode_first", "frames_first"
            else:
                forward, frames = f"decode_next.{'ab'[self._side[session]]}", "frames_next"
                self._side[session] ^= 1
            seconds += self._executor.run(session, forward)
            if index == self._chunk_frames - 1:
                witness = self._witnesses[self._side[session]]
                shown = self._executor.fetch(session, witness, "decode", self._chunk_frames + 1)
            take(frames, self._program.buffers[frames].buffer.shape[0], index)
        return seconds, Judged(written, view.dtype, shown, witness.dtype)

    def latent(self, session: int, latent: int, out: NDArray[np.float32]) -> float:
        """See `Engine.latent`."""
        self._executor.wait(session, latent)
        view = self._program.buffers["latents"].view.index(latent)
        return self._executor.fetch(session, view, "decode", self._chunk_frames).into(out)

    def encode_text_layer(
        self, hidden: NDArray[np.float32], mask: NDArray[np.float32], weights: Mapping[str, NDArray[Any]]
    ) -> NDArray[np.float32]:
        """See `Engine.encode_text_layer`."""
        with self._encoding:
            values = {"hidden": hidden, "mask": mask, **weights}
            with self._sending:
                self._executor.send(
                    0, "encode_text_layer", {f"encoder.{name}": value for name, value in values.items()}
                )
            self._executor.run(0, "encode_text_layer")
            out = np.empty(hidden.shape, dtype=np.float32)
            self._executor.fetch(0, self._program.buffers["encoder.hidden_out"].view, "text").into(out)
            return out

    def save(self, session: int, slots: Sequence[int]) -> tuple[dict[str, NDArray[np.uint8]], int]:
        """See `Engine.save`."""
        state = {name: self._executor.read(session, view) for name, view in self._kept(slots).items()}
        return state, self._side[session]

    def restore(
        self, session: int, slots: Sequence[int], buffers: Mapping[str, NDArray[np.uint8]], side: int
    ) -> None:
        """See `Engine.restore`.

        Raises:
            InputError: the buffers are not this pipeline's.
        """
        views = self._kept(slots)
        sizes = {name: view.nbytes for name, view in views.items()}
        if sizes != {name: array.nbytes for name, array in buffers.items()}:
            raise InputError(
                f"the saved session holds {len(buffers)} buffers of {sum(a.nbytes for a in buffers.values()):,} bytes; "
                f"this pipeline keeps {len(sizes)} of {sum(sizes.values()):,}"
            )
        for name, view in views.items():
            self._executor.write(session, view, buffers[name])
        self._side[session] = side

    def _kept(self, slots: Sequence[int]) -> dict[str, View]:
        """What a session keeps between chunks: buffers of its own, and its slots of the pool."""
        views: dict[str, View] = {}
        for name, placed in self._program.buffers.items():
            if placed.per_session:
                views[name] = placed.view
            elif name.startswith("past_") and slots:
                views[name] = placed.view.index(slots[0], len(slots))
        return views

    def close(self) -> None:
        """Free everything."""
        self._executor.close()


def _fill_slots(slots: NDArray[Any], moves: Sequence[Move]) -> None:
    slots.fill(ABSENT)
    for move in moves:
        slots[move.offset] = move.slot
