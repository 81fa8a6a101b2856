"""The order of one session's forwards: clean and commit the last chunk, switch the prompt, denoise the next.

The clean forward of a chunk runs when the next chunk is asked for, never after the last, so a chunk's latent
leaves one forward earlier. Where a bundle's schedule has none, a chunk is committed as its last denoising forward
leaves it.

A rolling rollout has several chunks under way, each a step further than the next, and finishes one by each forward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .bundle import Manifest, Recache
from .engine import Engine, JointChunk, Placement
from .errors import InputError, SessionCancelledError
from .frame_table import ABSENT, FrameTable, LatentRing, Move, TableState
from .noise import NoiseSource, check_noise, fill_noise

__all__ = [
    "PromptSwitch",
    "Rollout",
    "chunk_first_frame",
    "chunk_pixel_frames",
    "given_chunks",
    "most_start_frames",
    "rollout_kind",
    "start_clip",
]


@dataclass(frozen=True, eq=False)
class PromptSwitch:
    """A new prompt embedding `[text_len, dim]`, what happens to cached frames with it, and the caller's label.

    `step` marks what follows the first chunk of a transition: a newer switch takes its place.
    """

    embedding: NDArray[np.float32]
    recache: Recache
    label: str | None = None
    step: bool = False


def chunk_pixel_frames(manifest: Manifest, chunk: int) -> int:
    """Pixel frames of a chunk: the first latent frame of a rollout gives one, every other `temporal_factor`."""
    frames = manifest.model.chunk_frames * manifest.vae.temporal_factor
    return frames - manifest.vae.temporal_factor + 1 if chunk == 0 else frames


def chunk_first_frame(manifest: Manifest, chunk: int) -> int:
    """Number of a chunk's first pixel frame, counted from the start of the rollout."""
    if chunk == 0:
        return 0
    return chunk_pixel_frames(manifest, 0) + (chunk - 1) * chunk_pixel_frames(manifest, 1)


def given_chunks(manifest: Manifest, frames: int) -> int:
    """Whole chunks at the beginning of a rollout that `frames` pixel frames fill."""
    first, following = chunk_pixel_frames(manifest, 0), chunk_pixel_frames(manifest, 1)
    return 1 + (frames - first) // following


def most_start_frames(manifest: Manifest) -> int:
    """Pixel frames of as many chunks as attention can look back on: a rollout starts from no more."""
    frames = manifest.cache.max_past_frames - manifest.persistent_frames
    chunks = max(1, frames // manifest.model.chunk_frames)
    return chunk_first_frame(manifest, chunks)


def start_clip(manifest: Manifest, start: ArrayLike) -> NDArray[np.uint8]:
    """The frames `[N, H, W, 3]` that a rollout starts from: the last ones that fill whole chunks.

    `start` is an image `[H, W, 3]` or a video. At most as many chunks are taken as attention can look back on.
    Where there are too few frames for one chunk, the first is repeated in front: one image becomes a still.

    Raises:
        InputError: the bundle has no encoder, or these are no frames of its size.
    """
    if not manifest.has_encoder:
        raise InputError(
            f"bundle {manifest.name!r} has no video encoder, so it cannot start from frames; build it again "
            "--with-encoder"
        )
    frames = np.asarray(start)
    size = (manifest.model.video_height, manifest.model.video_width, 3)
    if frames.dtype != np.uint8 or frames.shape[-3:] != size or frames.ndim not in (3, 4) or not len(frames):
        raise InputError(
            f"start is {frames.dtype} {list(frames.shape)}; expected uint8 {list(size)}, an image, or [N, "
            f"{', '.join(map(str, size))}], a video"
        )
    frames = frames.reshape(-1, *size)
    first = chunk_pixel_frames(manifest, 0)
    if len(frames) < first:
        return np.concatenate([np.repeat(frames[:1], first - len(frames), axis=0), frames])
    chunks = given_chunks(manifest, min(len(frames), most_start_frames(manifest)))
    return frames[-chunk_first_frame(manifest, chunks) :]


class Rollout:
    """One session's rollout. `advance` and `decode` may run at once, on two threads."""

    def __init__(
        self,
        engine: Engine,
        session: int,
        manifest: Manifest,
        *,
        seed: int,
        on_device: bool = False,
        noise: ArrayLike | NoiseSource | None = None,
        latents: bool = False,
        start: NDArray[np.uint8] | None = None,
    ) -> None:
        """`on_device`: frames stay on the engine's device; `noise` takes the place of the seed's.

        `latents` says whether `latent` will be asked for each chunk; `start` are the frames of the first,
        given chunks.
        """
        model, cache = manifest.model, manifest.cache
        past, window = manifest.held_frames, manifest.window_slots
        slots = range(window + session * past, window + (session + 1) * past)
        self._engine = engine
        self._slots = slots
        self._on_device = on_device
        self._session = session
        self._manifest = manifest
        self._seed = seed
        self._table = FrameTable(
            slots,
            chunk_frames=model.chunk_frames,
            sink_frames=cache.sink_frames,
            persistent_frames=manifest.persistent_frames,
        )
        self._latents = LatentRing(
            chunk_frames=model.chunk_frames,
            sink_frames=cache.sink_frames,
            past_frames=past - manifest.persistent_frames,
        )
        shape = (model.latent_channels, model.chunk_frames, model.latent_height, model.latent_width)
        self._noise = np.zeros((manifest.schedule.noises, *shape), dtype=np.float32)
        self._source = None if noise is None else check_noise(noise, (manifest.schedule.most_steps, *shape))
        self._keeps_latents = latents
        self._warned = False
        self._start = start
        self.given = 0 if start is None else given_chunks(manifest, len(start))
        """Chunks at the beginning that are not denoised but encoded from frames."""
        engine.reset(session)

    @property
    def keeps_frames_on_device(self) -> bool:
        """Whether frames stay on the device."""
        return self._on_device

    @property
    def seed(self) -> int:
        """The seed of the noise."""
        return self._seed

    @property
    def has_own_noise(self) -> bool:
        """Whether the noise is the caller's, which no seed tells."""
        return self._source is not None

    def save(self) -> tuple[TableState, dict[str, NDArray[np.uint8]], int]:
        """Frame table, buffers, side of the decoder's caches. Nothing else may use the rollout meanwhile."""
        return self._table.state(self._slots.start), *self._engine.save(self._session, self._slots)

    def restore(self, table: TableState, buffers: Mapping[str, NDArray[np.uint8]], side: int) -> None:
        """Go on where `save` was called.

        Raises:
            InputError: it does not fit.
        """
        try:
            self._table.restore(self._slots.start, table)
        except ValueError as error:
            raise InputError(f"the saved session does not fit this pipeline: {error}") from None
        self._engine.restore(self._session, self._slots, buffers, side)

    def advance(self, switch: PromptSwitch | None, cancelled: Callable[[], bool]) -> float:
        """Denoise the next chunk, with a new prompt if there is one; the seconds spent in the backend.

        `cancelled` is asked between forwards; `SessionCancelledError` ends the rollout for good.
        """
        seconds = self._finish_last(switch, cancelled)
        chunk = self._table.begin()
        self._warn_past_table(chunk)
        if self._start is not None:
            _check(cancelled)
            latents = [self._latents.slot(given) for given in range(self.given)]
            seconds += self._engine.encode(self._session, self._start, latents)
            self._start = None
        return seconds if chunk < self.given else seconds + self._denoise(chunk, cancelled)

    def _denoise(self, chunk: int, cancelled: Callable[[], bool]) -> float:
        """Every denoising forward that `chunk` still needs."""
        seconds = 0.0
        rows = self._manifest.schedule.rows(chunk)
        for step in range(len(rows)):
            self._draw(step, chunk, step)
        self._engine.begin(self._session, self._placement(chunk), self._noise)
        for row in rows:
            _check(cancelled)
            seconds += self._engine.denoise(self._session, row)
        if not self._manifest.schedule.clean_forward:
            # Now, because the next chunk that is computed, maybe another session's, overwrites keys and values.
            self._commit()
            self._place_sinks()
        return seconds

    def _draw(self, index: int, chunk: int, step: int) -> None:
        """The noise of a chunk's step, as number `index` of what the next forwards are given."""
        if self._source is None:
            fill_noise(self._noise[index], seed=self._seed, chunk=chunk, step=step)
        else:
            self._noise[index] = self._source(chunk, step)

    def decode(self, chunk: int) -> tuple[NDArray[np.uint8], float]:
        """Frames of a chunk, uint8 `[N, H, W, 3]`, and the backend's seconds.

        They are an array of the caller's, or, if they stay on the device, `DeviceFrames`.

        Chunks must be decoded in order, at most one behind the chunk that `advance` works on.
        """
        if self._on_device:
            kept, seconds = self._engine.decode_on_device(
                self._session, self._latents.slot(chunk), first=chunk == 0
            )
            return cast(NDArray[np.uint8], kept), seconds
        model = self._manifest.model
        count = chunk_pixel_frames(self._manifest, chunk)
        frames = np.empty((count, model.video_height, model.video_width, 3), dtype=np.uint8)
        seconds = self._engine.decode(self._session, self._latents.slot(chunk), first=chunk == 0, out=frames)
        return frames, seconds

    def latent(self, chunk: int) -> NDArray[np.float32] | None:
        """A decoded chunk's clean latent `[channels, frames, h, w]`; None where latents are not kept.

        Called like `decode`, right after it.
        """
        if not self._keeps_latents:
            return None
        out = np.empty(self._noise.shape[1:], dtype=np.float32)
        self._engine.latent(self._session, self._latents.slot(chunk), out)
        return out

    def _finish_last(self, switch: PromptSwitch | None, cancelled: Callable[[], bool]) -> float:
        """Commit the chunk in flight, if any, and apply the prompt switch, if any."""
        chunk, recache = self._table.in_flight, switch.recache if switch else "none"
        if switch is not None and recache == "joint":
            return self._engine.condition(self._session, switch.embedding) + self._recache_jointly(cancelled)
        recomputes = recache in ("window", "all")
        seconds = 0.0
        if chunk is not None:
            # Recomputing makes the clean forward with the old prompt pointless, unless it is what fills the sinks, or
            # chooses which blocks stay of those that leave.
            sinks_pending = chunk * self._manifest.model.chunk_frames < self._manifest.cache.sink_frames
            chooses = self._manifest.persistent_frames and self._table.contest()[1]
            if not recomputes or (recache == "window" and (sinks_pending or chooses)):
                _check(cancelled)
                seconds += self._clean(self._placement(chunk))
                self._commit()
            else:
                self._table.commit()
            if recache != "all":
                self._place_sinks()
        if switch is not None:
            seconds += self._engine.condition(self._session, switch.embedding)
            if recache == "all":
                self._table.forget_persistent()  # there are no latents to recompute it from
            if recache in ("flush", "cut"):
                self._forget(cut=recache == "cut")
            if recomputes:
                seconds += self._recache(recache, cancelled)
        return seconds

    def _commit(self) -> None:
        """Make the frames of the chunk in flight resident, once what leaves for them has been looked through."""
        kept, evicted = self._table.contest()
        if self._manifest.persistent_frames and evicted:
            self._engine.persist(self._session, kept, evicted)
        self._engine.commit(self._session, self._table.commit())

    def _forget(self, *, cut: bool) -> None:
        """Flush the cache; with `cut`, let what follows lie far away in time."""
        self._table.flush(self._manifest.cache.flush_frames)
        self._place_sinks()  # before the jump: what is left keeps its distances
        if cut:
            self._table.jump(self._manifest.cache.cut_frames)

    def _recache_jointly(self, cancelled: Callable[[], bool]) -> float:
        """Recompute everything that attention sees in one forward, the chunk in flight included.

        As in LongLive's code, sinks are protected only once there are more frames than the window holds: before, the
        forward begins with the first frame and writes all of them.
        """
        model, table = self._manifest.model, self._table
        last = table.in_flight
        if last is None and not table.frames:
            return 0.0
        known = [*table.resident_chunks(), *([] if last is None else [last])]
        if (known[-1] + 1) * model.chunk_frames > self._manifest.window_frames:
            known = [
                chunk for chunk in known if chunk * model.chunk_frames >= self._manifest.cache.sink_frames
            ]
        chunks = [
            JointChunk(
                first_frame=table.position(chunk * model.chunk_frames),
                latent=self._latents.slot(chunk),
                moves=table.moves(chunk, sinks=True) if chunk != last else (),
            )
            for chunk in known
        ]
        _check(cancelled)
        before = None if last is not None else known[-1] * model.chunk_frames
        seconds = self._engine.recache(self._session, known[-1], chunks, table.frame_slots(before))
        self._engine.commit(self._session, chunks[-1].moves if last is None else table.commit())
        return seconds

    def _recache(self, recache: Recache, cancelled: Callable[[], bool]) -> float:
        """Recompute resident frames block-causally, oldest chunk first; each sees only frames before it."""
        seconds = 0.0
        for chunk in self._table.resident_chunks():
            moves = self._table.moves(chunk, sinks=recache == "all")
            if moves:
                _check(cancelled)
                seconds += self._clean(
                    self._placement(chunk, before=chunk * self._manifest.model.chunk_frames)
                )
                self._engine.commit(self._session, moves)
                if moves[0].frame < self._manifest.cache.sink_frames:
                    self._place_sinks()
        return seconds

    def _clean(self, placement: Placement) -> float:
        self._engine.begin(self._session, placement, None)
        return self._engine.clean(self._session)

    def _placement(self, chunk: int, *, before: int | None = None) -> Placement:
        return Placement(
            chunk=chunk,
            first_frame=self._table.position(chunk * self._manifest.model.chunk_frames),
            frame_slots=self._table.frame_slots(before),
            latent=self._latents.slot(chunk),
            pinned=self._table.pinned(before),
        )

    def _place_sinks(self) -> None:
        shift = self._table.sink_shift()
        if self._manifest.cache.sink_positions == "window" and shift:
            self._engine.place_sinks(self._session, self._table.sink_slots(), shift)

    def _warn_past_table(self, chunk: int) -> None:
        table = self._manifest.sparsity.table_frames
        past_table = (chunk + 1) * self._manifest.model.chunk_frames > table
        if past_table and self._manifest.cache.window_frames is None and not self._warned:
            self._warned = True
            warnings.warn(
                f"the rollout is past the {table} frames that this bundle was planned for: the window slides and "
                f"the last sparsity is kept; for long videos use a bundle of a long variant",
                stacklevel=2,
            )


class RollingRollout(Rollout):
    """One session's rollout with a window of chunks, of which the oldest leaves at every forward.

    The window fills at the beginning, so the first chunk takes as many forwards as a full window has chunks. A new
    prompt holds from the next forward on, for all chunks of the window. There is no end at which it would empty: chunks
    in the window are dropped with the session.
    """

    def _denoise(self, chunk: int, cancelled: Callable[[], bool]) -> float:
        seconds = 0.0
        latest = chunk + self._manifest.schedule.window_chunks - 1
        for newest in range(latest if chunk else 0, latest + 1):
            _check(cancelled)
            seconds += self._denoise_window(range(chunk, newest + 1))
        return seconds

    def _denoise_window(self, members: range) -> float:
        """One forward of the window's chunks."""
        frames, past = self._manifest.model.chunk_frames, self._manifest.cache.max_past_frames
        newest = members[-1]
        self._draw(0, newest, 0)
        for step in range(1, min(len(members), len(self._noise) - 1) + 1):
            self._draw(step, newest - step + 1, step)
        context = self._context(members)
        self._turn_anchor(context, members[0])
        inside = range(frames * (len(members) - 1))  # slots of the pool that no session has
        chunks = [
            JointChunk(
                first_frame=chunk * frames,
                latent=self._latents.slot(chunk),
                moves=tuple(
                    Move(offset=offset, slot=slot, frame=chunk * frames + offset)
                    for offset, slot in enumerate(inside[index * frames : (index + 1) * frames])
                ),
            )
            for index, chunk in enumerate(members)
        ]
        seen = (*self._table.slots_of(context), *inside)
        padding = (ABSENT,) * (past - len(seen))
        return self._engine.denoise_window(self._session, newest, chunks, (*seen, *padding), self._noise)

    def _context(self, members: range) -> Sequence[int]:
        """Cached frames that a window sees: the first chunk, and the latest that its attention has room for."""
        sinks, resident = self._manifest.cache.sink_frames, self._table.frames
        room = self._manifest.window_frames - self._manifest.model.chunk_frames * len(members) - sinks
        anchor, recent = resident[:sinks], resident[sinks:]
        return (*anchor, *recent[len(recent) - min(room, len(recent)) :])

    def _finish_last(self, switch: PromptSwitch | None, cancelled: Callable[[], bool]) -> float:
        """The clean forward of the chunk that left, which sees the latest frames, whether or not the first chunk is
        among them; then the prompt switch, if any.
        """
        seconds, chunk, past = 0.0, self._table.in_flight, self._manifest.cache.max_past_frames
        if chunk is not None:
            _check(cancelled)
            seen = self._table.frames[-past:]
            self._turn_anchor(seen, chunk)
            slots = self._table.slots_of(seen)
            padding = (ABSENT,) * (past - len(slots))
            first = chunk * self._manifest.model.chunk_frames
            seconds += self._clean(Placement(chunk, first, (*slots, *padding), self._latents.slot(chunk)))
            self._engine.commit(self._session, self._table.commit())
        if switch is not None:
            seconds += self._engine.condition(self._session, switch.embedding)
        return seconds

    def _turn_anchor(self, seen: Sequence[int], chunk: int) -> None:
        """Put the first chunk, where it is among the frames seen, just before the others of these, or before `chunk`
        where it is all of them.
        """
        sinks = self._manifest.cache.sink_frames
        if seen and seen[0] < sinks:
            after = seen[sinks] if len(seen) > sinks else chunk * self._manifest.model.chunk_frames
            self._engine.place_sinks(self._session, self._table.sink_slots(), after - sinks)


def rollout_kind(manifest: Manifest) -> type[Rollout]:
    """The order of forwards that a bundle's weights were trained for."""
    return RollingRollout if manifest.schedule.rolling else Rollout


def _check(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise SessionCancelledError("the session was cancelled")
