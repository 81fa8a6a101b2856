"""What the manifest says of rollouts: the forwards of a chunk, and which past frames stay."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from .fields import NonNegative, NonNegativeFloat, Part, Positive, Steps
from .policies import AttentionPolicy, persistent_frames

__all__ = ["RECACHE_MODES", "Cache", "Recache", "Schedule", "require_joint", "require_room"]

Recache = Literal["window", "all", "none", "joint", "flush", "cut"]
"""What happens to cached frames when the prompt changes.

They are recomputed chunk by chunk, each seeing only what came before it: all but the sinks (`"window"`), or
`"all"`. They stay as they are (`"none"`). All that attention sees is recomputed in one forward without a mask
(`"joint"`, LongLive's). They are forgotten but for the sinks and the latest few (`"flush"`, Infinity-RoPE's), and
moreover what follows lies far from them in time, so that the scene changes (`"cut"`).
"""
RECACHE_MODES: tuple[Recache, ...] = get_args(Recache)

_FirstSteps = Annotated[tuple[NonNegativeFloat, ...], Field(max_length=1000)]


_FEWEST_ROLLING = 2
"""Steps of a rolling schedule; a window of one chunk would not roll."""


class Schedule(Part):
    """Timesteps and sigmas of the forwards of a chunk: the denoising ones, then the clean one (0).

    `first_timesteps` and `first_sigmas` are those of the first chunk's denoising forwards, empty where it has no
    others. Without `clean_forward`, the cache takes keys and values from the last denoising forward.

    Where it is `rolling`, a denoising forward has a window of chunks, one in each row, which see each other; the oldest
    is in the last row and leaves the window by it.

    The component `step` is told its forward as a *row*: an index into `timesteps`, or, behind these, into
    `first_timesteps`.
    """

    timesteps: Steps
    sigmas: Steps
    first_timesteps: _FirstSteps = ()
    first_sigmas: _FirstSteps = ()
    clean_forward: bool = True
    rolling: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Schedule:
        for timesteps, sigmas, first in (
            (self.timesteps, self.sigmas, ""),
            (self.first_timesteps, self.first_sigmas, "first "),
        ):
            if len(timesteps) != len(sigmas):
                raise ValueError(f"{len(timesteps)} {first}timesteps but {len(sigmas)} {first}sigmas")
        if self.timesteps[-1] != 0 or self.sigmas[-1] != 0:
            raise ValueError("the last timestep and sigma belong to the clean forward and must be 0")
        if self.rolling and (
            self.first_timesteps or not self.clean_forward or self.denoise_steps < _FEWEST_ROLLING
        ):
            raise ValueError(
                f"schedule.rolling needs {_FEWEST_ROLLING} steps or more, the same for every chunk, and a clean forward"
            )
        return self

    @property
    def window_chunks(self) -> int:
        """Chunks that a full window of denoising forwards holds: one, unless it is rolling."""
        return self.denoise_steps if self.rolling else 1

    @property
    def denoise_steps(self) -> int:
        """Number of denoising forwards of a chunk after the first (the clean forward not included)."""
        return len(self.timesteps) - 1

    @property
    def most_steps(self) -> int:
        """Number of denoising forwards of the chunk that has most."""
        return max(self.denoise_steps, len(self.first_timesteps))

    @property
    def noises(self) -> int:
        """Latents of noise that a chunk is given: one for each forward, and at least two, because the last forward
        takes one that it does not use.
        """
        return max(2, self.most_steps)

    @property
    def clean_step(self) -> int:
        """Row of the clean forward."""
        return len(self.timesteps) - 1

    @property
    def row_count(self) -> int:
        """Number of rows, the clean forward's among them."""
        return len(self.timesteps) + len(self.first_timesteps)

    def rows(self, chunk: int) -> range:
        """Rows of the denoising forwards of `chunk`, in order."""
        if chunk == 0 and self.first_timesteps:
            return range(len(self.timesteps), self.row_count)
        return range(self.denoise_steps)

    def place(self, row: int) -> tuple[int, bool]:
        """Where a denoising forward comes in its chunk, counted from 0, and whether it is the chunk's last."""
        rows = self.rows(1) if row < self.clean_step else self.rows(0)
        return rows.index(row), row == rows[-1]


class Cache(Part):
    """Cache policy. `window_frames` counts the current chunk too; null means `sparsity.table_frames`.

    `sink_positions`: `"absolute"` keeps sink keys where they were committed, `"window"` moves them to
    just before the first recent frame whenever the window slides. `kv` is null where keys and values are held in
    the type that the model computes in, and `"fp8"` where they are codes of E4M3 (docs/operators.md).

    `recache` is what a prompt switch does where it does not say; `flush_frames` is how many frames besides the
    sinks outlive a flush or a cut, `cut_frames` how far a cut moves what follows it, in latent frames.
    """

    window_frames: Positive | None
    max_past_frames: NonNegative
    sink_frames: NonNegative
    sink_positions: Literal["absolute", "window"]
    recache: Recache = "window"
    flush_frames: NonNegative = 2
    cut_frames: NonNegative = 42
    kv: Literal["fp8"] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Cache:
        if self.sink_frames > self.max_past_frames:
            raise ValueError(
                f"sink_frames ({self.sink_frames}) does not fit into max_past_frames ({self.max_past_frames})"
            )
        return self


def require_joint(cache: Cache, window_frames: int, chunk_frames: int, segmented: bool) -> None:
    """Hold a bundle against what a joint recache needs.

    Raises:
        ValueError: its step is one graph, or its window or sinks are no whole chunks.
    """
    sinks = cache.sink_frames
    if not segmented or window_frames % chunk_frames or sinks % chunk_frames:
        raise ValueError(
            f"cache.recache is 'joint', which needs a step in segments and a window and sinks of whole chunks of "
            f"{chunk_frames} frames; found {'segments' if segmented else 'no segments'}, a window of "
            f"{window_frames} and {sinks} sinks"
        )


def require_room(method: AttentionPolicy, cache: Cache, chunk_frames: int) -> None:
    """Hold a cache against what a persistent set needs of it, where there is one.

    Raises:
        ValueError: it has no room for the set, the sinks and a chunk, or recomputes jointly.
    """
    virtual, sinks = persistent_frames(method), cache.sink_frames
    if virtual and (cache.recache == "joint" or cache.max_past_frames < virtual + sinks + chunk_frames):
        raise ValueError(
            f"attention.method is 'pbsa', which needs another recache than 'joint', and beside {sinks} sinks and "
            f"{virtual} persistent frames those of a chunk of {chunk_frames}; found {cache.recache!r} and "
            f"max_past_frames {cache.max_past_frames}"
        )
