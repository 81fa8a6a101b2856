"""What an execution backend offers the rollout: forwards, and the buffers they read and write.

The rollout owns the order of things and knows no buffer; the engine owns the buffers and knows no order. Frames
are named by pool slot, chunk latents by latent slot, sessions by number. Everything that changes from chunk to
chunk enters through `Engine.begin`, once per chunk, so that the forwards themselves take no host data: an
engine may record them once and replay them.

Threads: one thread calls `condition` to `place_sinks`, another calls `decode` and `latent`; both may run at
once, also for one session, but never on the same latent slot. `reset` and `encode_text_layer` may be called from
any thread, `reset` only while nothing else uses that session. Only `decode` and `latent` must have finished their
work when they return (and must wait for the latent they read); the others may return as soon as it is queued.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .frame_table import Move

if TYPE_CHECKING:
    from .bundle.golden import ComponentRunner
    from .frames import DeviceFrames

__all__ = ["Engine", "JointChunk", "Placement"]


@dataclass(frozen=True)
class Placement:
    """Where a chunk stands.

    `chunk` is its index (into the sparsity table), `first_frame` the temporal position of its first frame,
    `frame_slots` the pool slots of the frames it may attend to, oldest first, padded with -1, and `latent`
    the latent slot that holds its clean latent (written by the last denoising forward, read by the clean one).
    `pinned` is how many of `frame_slots` everybody sees, for attention that asks.
    """

    chunk: int
    first_frame: int
    frame_slots: tuple[int, ...]
    latent: int
    pinned: int = 0


@dataclass(frozen=True)
class JointChunk:
    """A chunk of those that one forward computes together: where it lies in time, the slot of its clean latent, and
    where its frames go in the pool.
    """

    first_frame: int
    latent: int
    moves: tuple[Move, ...]


class Engine(Protocol):
    """Executes the components of one bundle for a fixed number of sessions.

    Methods that return a float return the seconds spent in the backend itself, so that the caller can tell them
    from its own overhead. All raise `EngineError` when a forward fails.
    """

    on_device: bool
    """Whether it has a device of its own, on which frames may stay: `decode_on_device`."""

    def warmup(self) -> None:
        """Run every component once, so that the first chunk costs what the others do."""

    def reset(self, session: int) -> None:
        """Prepare the buffers of `session` for a new rollout."""

    def condition(self, session: int, embedding: NDArray[np.float32]) -> float:
        """Compute the cross-attention keys and values from a prompt embedding `[text_len, dim]`."""

    def begin(self, session: int, placement: Placement, noise: NDArray[np.float32] | None) -> None:
        """Set what the next forwards of `session` work on.

        `noise` is `[noises, channels, frames, h, w]`: the initial latent, then what re-noises it
        before each further forward; what a chunk of fewer steps leaves over is not read. `None` if only the clean
        forward follows.
        """

    def encode(self, session: int, frames: NDArray[np.uint8], latents: Sequence[int]) -> float:
        """Encode the clip `frames` `[N, H, W, 3]` into latent slots, a chunk each. Only where a bundle can."""

    def denoise(self, session: int, row: int) -> float:
        """One denoising forward, by its row of the schedule. Those of a chunk run in order."""

    def denoise_window(
        self,
        session: int,
        chunk: int,
        chunks: Sequence[JointChunk],
        frame_slots: Sequence[int],
        noise: NDArray[np.float32],
    ) -> float:
        """One denoising forward of a rolling window, oldest chunk first, the latest in row 0 of the schedule. All see
        each other and the frames of `frame_slots`, among which are those of all but the last chunk. Where the window is
        full, the oldest chunk's clean latent goes to its slot. `noise[0]` is the latest chunk's initial latent,
        `noise[n]` what re-noises the chunk in row n - 1. `chunk` is as in `Placement`.
        """

    def clean(self, session: int) -> float:
        """The forward on the clean latent whose only results are the chunk's keys and values."""

    def recache(
        self, session: int, chunk: int, chunks: Sequence[JointChunk], frame_slots: Sequence[int]
    ) -> float:
        """One forward on the clean latents of `chunks`, oldest first, all of which see each other and the frames of
        `frame_slots`. All but the last are committed by it, layer by layer; the last one's keys and values are left
        for `commit`. Only where the bundle's cache is recomputed jointly. `chunk` is as in `Placement`.
        """

    def persist(self, session: int, kept: int, evicted: int) -> None:
        """Choose which blocks outlive the window, by the last forward, before `commit` overwrites what is evicted.

        Of the past frames behind the sinks the first `kept` are virtual; the `evicted` behind them leave, and blocks of
        theirs take the places of worse ones. Only where a bundle has a persistent set.
        """

    def commit(self, session: int, moves: Sequence[Move]) -> None:
        """Copy keys, values and block means of the last forward into the pool."""

    def place_sinks(self, session: int, slots: Sequence[int], shift: int) -> None:
        """Rewrite the sink frames' keys in `slots`, moved by `shift` frames from where they were committed."""

    def decode(self, session: int, latent: int, *, first: bool, out: NDArray[np.uint8]) -> float:
        """Decode a chunk's latent into `out` `[frames, H, W, 3]`; `first` for the first of a rollout."""

    def decode_on_device(self, session: int, latent: int, *, first: bool) -> tuple[DeviceFrames, float]:
        """Like `decode`, into memory of the device; the frames and the seconds.

        Raises:
            InputError: there is no device; see `on_device`.
        """

    def component_runner(self) -> ComponentRunner:
        """Runs single components, for verification; only while no session is open, and dropped then."""

    def latent(self, session: int, latent: int, out: NDArray[np.float32]) -> float:
        """Copy a chunk's clean latent into `out` `[channels, frames, h, w]`; in the thread of `decode`."""

    def encode_text_layer(
        self, hidden: NDArray[np.float32], mask: NDArray[np.float32], weights: Mapping[str, NDArray[Any]]
    ) -> NDArray[np.float32]:
        """One layer of the text encoder. `hidden` `[text_len, dim]`, `mask` 1 where there is a token."""

    def save(self, session: int, slots: Sequence[int]) -> tuple[dict[str, NDArray[np.uint8]], int]:
        """What `session` keeps between chunks, as bytes by buffer, and which side its decoder's caches are on.

        `slots` are its own. Nothing else may use the session meanwhile, here and in `restore`.
        """

    def restore(
        self, session: int, slots: Sequence[int], buffers: Mapping[str, NDArray[np.uint8]], side: int
    ) -> None:
        """Take over what `save` gave.

        Raises:
            InputError: it does not fit.
        """

    def close(self) -> None:
        """Free everything. No other method may be running."""
