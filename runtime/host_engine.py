"""The engine that runs anywhere: components on the host, one engine for every kind of them.

All tensors that cross the boundary live in arrays allocated once, and every kind of forward has a binding made once,
so a forward allocates nothing on our side and copies nothing: denoising forward s reads what forward s - 1 wrote, keys
and values stay in the pool, and the decoder's caches ping-pong between two sets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle
from .cache import ABSENT, Move
from .engine import Placement
from .errors import BundleError
from .inductor import SUFFIX as PACKAGE_SUFFIX
from .inductor import InductorGraph
from .memory import Buffer, BufferPlan
from .onnxruntime_engine import OnnxGraph, default_threads
from .rope import RopeTables
from .segmented import Graph, SegmentedForward, load_segments

__all__ = ["HostEngine", "load_graph"]

Arrays = dict[str, NDArray[Any]]


def load_graph(bundle: Bundle, name: str, threads: int) -> Graph:
    """Load a component with what its file is for: ONNX Runtime, or PyTorch for a package of Inductor's.

    Raises:
        BundleError: the component has no file, or another graph than the manifest says.
        EngineError: it does not load.
    """
    file = bundle.component(name).file
    if file is None:
        raise BundleError(
            f"component {name!r} of bundle {bundle.root} is executed as segments or by a kernel and has no file"
        )
    return (InductorGraph if file.endswith(PACKAGE_SUFFIX) else OnnxGraph)(bundle, name, threads)


@dataclass(frozen=True)
class _SessionState:
    """Arrays and bindings of one session."""

    arrays: Arrays
    condition: Any
    denoise: tuple[Any, ...]
    clean: Any
    decode_first: Any
    decode_next: tuple[Any, Any]


class HostEngine:
    """Implements :class:`~runtime.engine.Engine` with one loaded graph per component.

    ``plan`` is :func:`~runtime.memory.plan_buffers` of the bundle, checked against memory by the caller.
    ``threads`` is the number of threads per forward (default: :func:`default_threads`).
    """

    def __init__(self, bundle: Bundle, plan: BufferPlan, *, threads: int | None = None) -> None:
        manifest = bundle.manifest
        count = threads or default_threads()
        self._model = manifest.model
        self._steps = manifest.schedule.denoise_steps
        self._caches = len(manifest.vae.caches)
        self._sinks = manifest.cache.sink_frames if manifest.cache.sink_positions == "window" else 0
        self._rope = RopeTables(manifest.model)

        def load(name: str) -> Graph:
            return load_graph(bundle, name, count)

        self._step: Graph | SegmentedForward
        self._clean: Graph | SegmentedForward
        if manifest.segments is None:
            self._step, self._clean = load("step"), load("clean")
        else:
            self._step, self._clean = load_segments(bundle, manifest.segments, load)
        self._conditioner, self._text_layer = load("conditioner"), load("text_encoder")
        self._vae_first, self._vae_next = load("vae_first"), load("vae_next")

        self._pool = _allocate(plan.pool)
        self._shared = _allocate(plan.shared)
        self._scalars = [np.array(step, dtype=np.int32) for step in range(self._steps + 1)]  # the last: clean
        self._sessions = [self._bind(_allocate(plan.session)) for _ in range(plan.sessions)]
        self._latent_slot = [0] * plan.sessions
        self._side = [0] * plan.sessions

    def _bind(self, arrays: Arrays) -> _SessionState:
        shared = self._shared
        inputs = {**self._pool, **shared, **arrays}
        noise, denoised = shared["noise"], shared["denoised"]
        denoise = []
        for step in range(self._steps):
            following = noise[min(step + 1, self._steps - 1)]  # the last forward does not use it
            own = {
                "latent": denoised[step - 1] if step else noise[0],
                "noise": following,
                "step": self._scalars[step],
            }
            denoise.append(self._step.bind(inputs | own, shared | {"next_latent": denoised[step]}))
        sides = [
            {f"cache.{index}": arrays[f"cache.{index}.{side}"] for index in range(self._caches)}
            for side in "ab"
        ]
        outs = [
            {name.replace("cache.", "cache_out."): array for name, array in side.items()} for side in sides
        ]
        latent = {"latent": shared["vae_latent"]}
        return _SessionState(
            arrays=arrays,
            condition=self._conditioner.bind(shared, arrays),
            denoise=tuple(denoise),
            clean=self._clean.bind(
                inputs | {"latent": shared["clean_latent"], "step": self._scalars[-1]}, shared
            ),
            decode_first=self._vae_first.bind(latent, outs[0] | {"frames": shared["frames_first"]}),
            decode_next=(
                self._vae_next.bind(latent | sides[0], outs[1] | {"frames": shared["frames_next"]}),
                self._vae_next.bind(latent | sides[1], outs[0] | {"frames": shared["frames_next"]}),
            ),
        )

    def warmup(self) -> None:
        """Run every component but the text encoder's layer once, on session 0."""
        absent = (ABSENT,) * self._shared["frame_slots"].size
        self.condition(0, np.zeros_like(self._shared["text"]))
        self.begin(
            0,
            Placement(chunk=0, first_frame=0, frame_slots=absent, latent=0),
            np.zeros_like(self._shared["noise"]),
        )
        for step in range(self._steps):
            self.denoise(0, step)
        self.begin(0, Placement(chunk=0, first_frame=0, frame_slots=absent, latent=0), None)
        self.clean(0)
        first, following = self._shared["frames_first"], self._shared["frames_next"]
        frames = len(first) + (self._model.chunk_frames - 1) * len(following)
        self.decode(0, 0, first=True, out=np.empty((frames, *first.shape[1:]), dtype=np.uint8))
        self.reset(0)

    def reset(self, session: int) -> None:
        """Zero the decoder's caches; everything else is written before it is read."""
        for name, array in self._sessions[session].arrays.items():
            if name.startswith("cache."):
                array.fill(0)
        self._side[session] = 0

    def condition(self, session: int, embedding: NDArray[np.float32]) -> float:
        """See :meth:`Engine.condition <runtime.engine.Engine.condition>`."""
        np.copyto(self._shared["text"], embedding)
        return self._conditioner.run(self._sessions[session].condition)

    def begin(self, session: int, placement: Placement, noise: NDArray[np.float32] | None) -> None:
        """See :meth:`Engine.begin <runtime.engine.Engine.begin>`."""
        shared = self._shared
        shared["chunk"][...] = placement.chunk
        shared["frame_slots"][...] = placement.frame_slots
        self._rope.fill(placement.first_frame, shared["rope_cos"], shared["rope_sin"])
        self._latent_slot[session] = placement.latent
        if noise is None:
            np.copyto(shared["clean_latent"], self._sessions[session].arrays["latents"][placement.latent])
        else:
            np.copyto(shared["noise"], noise)

    def denoise(self, session: int, step: int) -> float:
        """See :meth:`Engine.denoise <runtime.engine.Engine.denoise>`."""
        state = self._sessions[session]
        seconds = self._step.run(state.denoise[step])
        if step == self._steps - 1:
            np.copyto(state.arrays["latents"][self._latent_slot[session]], self._shared["x0"])
        return seconds

    def clean(self, session: int) -> float:
        """See :meth:`Engine.clean <runtime.engine.Engine.clean>`."""
        return self._clean.run(self._sessions[session].clean)

    def commit(self, session: int, moves: Sequence[Move]) -> None:
        """See :meth:`Engine.commit <runtime.engine.Engine.commit>`."""
        arrays = self._sessions[session].arrays
        for name, pool in self._pool.items():
            staged = self._shared[name.removeprefix("past_")].reshape(-1, *pool.shape[1:])
            copies = arrays.get(name.replace("past_", "sink_"))
            for move in moves:
                pool[move.slot] = staged[move.offset]
                if copies is not None and move.frame < self._sinks:
                    copies[move.frame] = staged[move.offset]

    def place_sinks(self, session: int, slots: Sequence[int], shift: int) -> None:
        """See :meth:`Engine.place_sinks <runtime.engine.Engine.place_sinks>`."""
        for name, copies in self._sessions[session].arrays.items():
            if name.startswith("sink_"):
                pool = self._pool[name.replace("sink_", "past_")]
                for index, slot in enumerate(slots):
                    self._rope.shift(copies[index], shift, out=pool[slot])

    def decode(self, session: int, latent: int, *, first: bool, out: NDArray[np.uint8]) -> float:
        """See :meth:`Engine.decode <runtime.engine.Engine.decode>`."""
        state = self._sessions[session]
        chunk = state.arrays["latents"][latent]
        seconds, written = 0.0, 0
        for index in range(chunk.shape[1]):
            np.copyto(self._shared["vae_latent"], chunk[:, index : index + 1])
            if first and index == 0:
                seconds += self._vae_first.run(state.decode_first)
                frames = self._shared["frames_first"]
            else:
                seconds += self._vae_next.run(state.decode_next[self._side[session]])
                self._side[session] ^= 1
                frames = self._shared["frames_next"]
            out[written : written + len(frames)] = frames
            written += len(frames)
        return seconds

    def encode_text_layer(
        self, hidden: NDArray[np.float32], mask: NDArray[np.float32], weights: Mapping[str, NDArray[Any]]
    ) -> NDArray[np.float32]:
        """See :meth:`Engine.encode_text_layer <runtime.engine.Engine.encode_text_layer>`."""
        (result,) = self._text_layer.call({"hidden": hidden, "mask": mask, **weights})
        return np.asarray(result, dtype=np.float32)

    def close(self) -> None:
        """Drop the buffers and the graphs."""
        self._sessions.clear()
        self._pool.clear()
        self._shared.clear()
        for name in ("_step", "_clean", "_conditioner", "_text_layer", "_vae_first", "_vae_next"):
            delattr(self, name)


def _allocate(buffers: Sequence[Buffer]) -> Arrays:
    return {buffer.name: np.zeros(buffer.shape, dtype=buffer.dtype) for buffer in buffers}
