"""The execution of a bundle as data: buffers in one arena, and for each kind of forward a list of operations.

A program is built from a manifest (`runtime.program.builder`) and interpreted three times over: checked with no
device (`runtime.verify.dry_run`), run on the host (`runtime.host.executor`), run on a GPU
(`runtime.cuda.executor`). What changes from chunk to chunk lies in buffers that are *fed* before a forward; the
operations themselves never change, so a forward can be recorded once and replayed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from runtime.bundle import Dtype, nbytes
from runtime.bundle.images import KernelProblem

from .buffers import Buffer

__all__ = [
    "ALIGNMENT",
    "KERNEL_OUTPUTS",
    "Copy",
    "EngineRun",
    "Fill",
    "Forward",
    "KernelLaunch",
    "Operation",
    "Placed",
    "Program",
    "Queue",
    "View",
]

_SAMPLE_BYTES: Final = 4 << 20
"""Of a decoder's cache, what is copied to the host with a chunk: the frames of a clip are three times that."""
_CACHED_FRAMES: Final = 2

ALIGNMENT: Final = 256
"""Of every buffer, in bytes: what TensorRT asks of tensors and activation memory."""

Queue = Literal["forward", "decode", "text"]
"""Forwards of one queue run one after another; those of different queues at the same time."""

KERNEL_OUTPUTS: Final[Mapping[str, tuple[str, ...]]] = {
    **dict.fromkeys(("prepare", "prepare_scaled"), ("q", "k", "v", "q_mean", "k_mean")),
    "score": ("scores",),
    "select": ("lists", "counts"),
    "attend": ("out",),
    "expand": ("lists", "counts"),
    "mean_key": ("shift",),
    "resemble": ("unlike_q", "unlike_k"),
    "select_sparge": ("lists", "counts"),
    "pool": ("q_pool", "k_pool"),
    "score_groups": ("scores",),
    "choose": ("block_map",),
    "attend_ordered": ("out",),
    "sum_linear": ("frame_state", "frame_features"),
    "project_linear": ("linear_state", "linear_features"),
    "add_linear": ("out",),
    "commit": ("past_k", "past_v", "past_kmean"),
    "select_pinned": ("lists", "counts"),
    "weigh": ("importance",),
    "persist": ("past_k", "past_v", "past_kmean"),
    "rope_sink": ("past_k", "past_kmean"),
    **dict.fromkeys(
        ("prepare_fp8", "prepare_scaled_fp8"), ("q", "k", "v", "q_mean", "k_mean", "k_scale", "v_scale")
    ),
    "attend_fp8": ("out",),
    "attend_e4m3": ("out",),
    "commit_fp8": ("past_k", "past_v", "past_kmean", "past_kscale", "past_vscale"),
    "rope_sink_fp8": ("past_k", "past_kmean", "past_kscale"),
}
"""The buffers that each kernel writes."""


@dataclass(frozen=True)
class View:
    """A tensor in a buffer, `offset` bytes from its start.

    `pitch` is the distance in bytes between the rows of the first axis where that is not the size of a row.
    """

    buffer: str
    dtype: Dtype
    shape: tuple[int, ...]
    offset: int = 0
    pitch: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return nbytes(self.dtype, self.shape)

    @property
    def extent(self) -> int:
        """Bytes from the first element to the end of the last."""
        if self.pitch is None or not self.shape[0]:
            return self.nbytes
        return self.pitch * (self.shape[0] - 1) + self.nbytes // self.shape[0]

    def index(self, start: int, count: int | None = None) -> View:
        """Element `start` along the first axis, or `count` of them from there."""
        row = self.nbytes // self.shape[0]
        shape = self.shape[1:] if count is None else (count, *self.shape[1:])
        return replace(self, shape=shape, offset=self.offset + start * row)


@dataclass(frozen=True)
class EngineRun:
    """One run of a component. `layer` says where in the model, for messages."""

    component: str
    inputs: Mapping[str, View]
    outputs: Mapping[str, View]
    scratch: View | None = None
    layer: int | None = None

    @property
    def tensors(self) -> dict[str, View]:
        """Inputs and outputs."""
        return {**self.inputs, **self.outputs}


@dataclass(frozen=True)
class KernelLaunch:
    """One launch of a kernel of `runtime.program.kernels`."""

    kernel: str
    problem: KernelProblem
    buffers: Mapping[str, View]
    options: Mapping[str, int | float] = field(default_factory=dict)
    layer: int | None = None

    @property
    def outputs(self) -> dict[str, View]:
        """What it writes."""
        return {name: self.buffers[name] for name in KERNEL_OUTPUTS[self.kernel] if name in self.buffers}

    @property
    def inputs(self) -> dict[str, View]:
        """What it reads."""
        outputs = KERNEL_OUTPUTS[self.kernel]
        return {name: view for name, view in self.buffers.items() if name not in outputs}


@dataclass(frozen=True)
class Copy:
    """Copy `source` to `target`: the same number of bytes, either may have a pitch."""

    source: View
    target: View
    layer: int | None = None

    @property
    def inputs(self) -> dict[str, View]:
        """What it reads."""
        return {"source": self.source}

    @property
    def outputs(self) -> dict[str, View]:
        """What it writes."""
        return {"target": self.target}


@dataclass(frozen=True)
class Fill:
    """Set every byte of `target` to zero."""

    target: View
    layer: int | None = None

    @property
    def inputs(self) -> dict[str, View]:
        """Nothing."""
        return {}

    @property
    def outputs(self) -> dict[str, View]:
        """What it writes."""
        return {"target": self.target}


Operation = EngineRun | KernelLaunch | Copy | Fill


@dataclass(frozen=True)
class Forward:
    """`feeds` are written by the host before the operations run, in stream order."""

    name: str
    queue: Queue
    feeds: tuple[View, ...]
    operations: tuple[Operation, ...]


@dataclass(frozen=True)
class Placed:
    """Where a buffer lies: in the part of the arena that sessions share, or in each session's own."""

    buffer: Buffer
    offset: int
    per_session: bool

    @property
    def view(self) -> View:
        """The whole buffer."""
        return View(self.buffer.name, self.buffer.dtype, self.buffer.shape)


@dataclass(frozen=True)
class Program:
    """Buffers, forwards, and where the weights go.

    `forwards` has, in the order a rollout first needs them: `load` (once), `reset` (once per rollout),
    `condition`; `encode_first`, `encode_next.a` and `encode_next.b` where a rollout can start from frames;
    `begin`, `denoise.ROW` for each row, or `window.N` where so many chunks are denoised at once, `begin_clean`,
    `clean`, `joint.N` where so many chunks may be recomputed at once, `persist` where blocks outlive the window,
    `commit`; `keep_sinks.0` and on (copies of the sinks that chunk holds) and `place_sinks` where sinks move;
    `decode_first`, `decode_next.a` and `decode_next.b`, `encode_text_layer`. What ends in a side reads the caches of
    that side and writes the other's.

    `weights` maps tensors of the segments' weights file to where they are kept.
    """

    sessions: int
    buffers: Mapping[str, Placed]
    shared_bytes: int
    session_bytes: int
    forwards: Mapping[str, Forward]
    weights: Mapping[str, View]
    latent_slots: int
    finished: View
    """Where the last denoising forward of a chunk leaves its clean latent."""

    @property
    def arena_bytes(self) -> int:
        """Bytes of everything together."""
        return self.shared_bytes + self.sessions * self.session_bytes

    def offset(self, view: View, session: int) -> int:
        """Where `view` begins in the arena, for `session`."""
        placed = self.buffers[view.buffer]
        start = self.shared_bytes + session * self.session_bytes if placed.per_session else 0
        return start + placed.offset + view.offset

    def store_latent(self, slot: int) -> Copy:
        """Keep the clean latent of the chunk that was just denoised."""
        return Copy(self.finished, self.buffers["latents"].view.index(slot))

    def load_latent(self, slot: int) -> Copy:
        """Hand a kept latent to the clean forward."""
        return Copy(self.buffers["latents"].view.index(slot), self.buffers["clean_latent"].view)

    def store_encoded(self, slot: int, frame: int) -> Copy:
        """Keep what the encoder made of the frames that `frame` of a latent stands for."""
        return Copy(self.buffers["encoded"].view, self._latent_frame(slot, frame))

    def load_joint_latent(self, slot: int, chunk: int) -> Copy:
        """Hand a kept latent to the joint forward, as that of its chunk number `chunk`."""
        return Copy(self.buffers["latents"].view.index(slot), self.buffers[f"joint.{chunk}.latent"].view)

    def decode_latent(self, slot: int, frame: int) -> Copy:
        """Hand one frame of a kept latent to the decoder."""
        return Copy(self._latent_frame(slot, frame), self.buffers["vae_latent"].view)

    @property
    def decoder_witnesses(self) -> tuple[View, View]:
        """By the side of the decoder's caches, what tells whether the decoder has overflowed before.

        That is a part of the last cache, which the last convolution reads: a number that is not finite spreads from
        layer to layer, by norms over all channels of a pixel and by convolutions to the pixels and frames around it.
        One channel has it then, and where channels lie last, one row of pixels in several.
        """
        caches = [name.split(".")[1] for name in self.buffers if name.startswith("cache.")]
        last = max(map(int, caches))
        first, second = (_sample(self.buffers[f"cache.{last}.{side}"].view) for side in "ab")
        return first, second

    def _latent_frame(self, slot: int, frame: int) -> View:
        chunk = self.buffers["latents"].view.index(slot)  # [channels, frames, h, w]
        channels, frames, *size = chunk.shape
        row = chunk.nbytes // (channels * frames)
        return replace(
            chunk, shape=(channels, 1, *size), offset=chunk.offset + frame * row, pitch=frames * row
        )

    def walk(self) -> Iterator[tuple[Forward, Operation]]:
        """Every operation of every forward."""
        for forward in self.forwards.values():
            for operation in forward.operations:
                yield forward, operation


def _sample(view: View) -> View:
    """A part of a cache that is read quickly; a small one as a whole.

    Of `[C, T, H, W]` or `[C, H, W]` some channels, of `[T, H, W, C]` or `[H, W, C]` one row of pixels in several. Two
    frames are kept at most, and no decoder has more channels than rows where it is at its largest.
    """
    shape = view.shape[1:] if view.shape[0] == 1 else view.shape
    whole = replace(view, shape=shape)
    if view.nbytes <= _SAMPLE_BYTES or len(shape) < 3:
        return whole
    is_last = shape[0] <= _CACHED_FRAMES if len(shape) == 4 else shape[-1] < shape[0]
    if not is_last:
        return whole.index(0, max(1, _SAMPLE_BYTES * shape[0] // view.nbytes))
    rows, step = math.prod(shape[:-2]), -(-view.nbytes // _SAMPLE_BYTES)
    return replace(view, shape=(-(-rows // step), shape[-2] * shape[-1]), pitch=step * (view.nbytes // rows))
