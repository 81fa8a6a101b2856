"""The engine that runs anywhere: ONNX Runtime on the host.

All tensors that cross the boundary live in arrays allocated once, and every kind of forward has an I/O binding
made once, so a forward allocates nothing on our side and copies nothing: denoising forward s reads what forward
s - 1 wrote, keys and values stay in the pool, and the decoder's caches ping-pong between two sets.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle
from .cache import ABSENT, Move
from .engine import Placement
from .errors import BundleError, EngineError
from .manifest import TensorSpec
from .memory import Buffer, BufferPlan
from .rope import RopeTables
from .segmented import SegmentedForward, load_segments

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding

__all__ = ["OnnxGraph", "OnnxRuntimeEngine", "default_threads"]

Arrays = dict[str, NDArray[Any]]
_ORT_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)",
    "int32": "tensor(int32)",
    "int64": "tensor(int64)",
    "uint8": "tensor(uint8)",
    "bool": "tensor(bool)",
}
_ORT_ERRORS_ONLY = 3


def default_threads() -> int:
    """Threads per forward: ``OMP_NUM_THREADS`` if set, else the cores this process may use."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    if value.isdecimal() and int(value) > 0:
        return int(value)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class OnnxGraph:
    """One component, loaded. Runs bound to fixed addresses."""

    def __init__(self, bundle: Bundle, name: str, threads: int) -> None:
        import onnxruntime as ort

        component = bundle.component(name)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _ORT_ERRORS_ONLY
        # Several graphs take turns on the same cores; a pool that spins while it waits would take them from the next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if component.file is None:
            raise BundleError(
                f"component {name!r} of bundle {bundle.root} is executed as segments and has no file"
            )
        path = bundle.path(component.file)
        try:
            self._session: InferenceSession = ort.InferenceSession(
                path, sess_options=options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise EngineError(
                f"component {name!r} ({path}) does not load in ONNX Runtime {ort.__version__}: {error}; rebuild "
                f"the bundle, or install the onnxruntime version its manifest names"
            ) from error
        self.name = name
        self.inputs = {spec.name: spec for spec in component.inputs}
        self.outputs = {spec.name: spec for spec in component.outputs}
        self._check(self.inputs, self._session.get_inputs(), "input")
        self._check(self.outputs, self._session.get_outputs(), "output")

    def _check(self, specs: Mapping[str, TensorSpec], found: Sequence[Any], kind: str) -> None:
        graph = {arg.name: _describe(arg.type, arg.shape) for arg in found}
        manifest = {name: _describe(_ORT_TYPES[spec.dtype], spec.shape) for name, spec in specs.items()}
        wrong = sorted(name for name in graph | manifest if graph.get(name) != manifest.get(name))
        if wrong:
            raise BundleError(
                f"component {self.name!r}: {len(wrong)} {kind}(s) differ between manifest and graph, the first is "
                f"{wrong[0]!r}: {manifest.get(wrong[0], 'absent')} in the manifest, "
                f"{graph.get(wrong[0], 'absent')} in the graph; rebuild the bundle"
            )

    def bind(self, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]) -> IOBinding:
        """Bind the component's inputs and outputs to arrays, which must stay alive and in place."""
        binding = self._session.io_binding()
        for specs, arrays, bind in (
            (self.inputs, inputs, binding.bind_input),
            (self.outputs, outputs, binding.bind_output),
        ):
            for name in specs:
                if name not in arrays:
                    raise BundleError(
                        f"component {self.name!r} has a tensor {name!r} that this runtime does not know; rebuild "
                        f"the bundle with the exporter of this version"
                    )
                array = arrays[name]
                bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return binding

    def run(self, binding: IOBinding) -> float:
        """Run a binding; the seconds it took."""
        start = time.perf_counter()
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise EngineError(f"component {self.name!r} failed: {error}") from error
        return time.perf_counter() - start

    def call(self, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run on arbitrary arrays; the outputs in order."""
        try:
            return list(self._session.run(None, dict(inputs)))
        except Exception as error:
            raise EngineError(f"component {self.name!r} failed: {error}") from error


@dataclass(frozen=True)
class _SessionState:
    """Arrays and bindings of one session."""

    arrays: Arrays
    condition: IOBinding
    denoise: tuple[IOBinding, ...]
    clean: IOBinding
    decode_first: IOBinding
    decode_next: tuple[IOBinding, IOBinding]


class OnnxRuntimeEngine:
    """Implements :class:`~runtime.engine.Engine` with one ONNX Runtime session per component.

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
        self._step: OnnxGraph | SegmentedForward
        self._clean: OnnxGraph | SegmentedForward
        if manifest.segments is None:
            self._step, self._clean = OnnxGraph(bundle, "step", count), OnnxGraph(bundle, "clean", count)
        else:
            self._step, self._clean = load_segments(
                bundle, manifest.segments, lambda name: OnnxGraph(bundle, name, count)
            )
        self._conditioner = OnnxGraph(bundle, "conditioner", count)
        self._text_layer = OnnxGraph(bundle, "text_encoder", count)
        self._vae_first = OnnxGraph(bundle, "vae_first", count)
        self._vae_next = OnnxGraph(bundle, "vae_next", count)

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


def _describe(kind: str, shape: Sequence[int | str | None]) -> str:
    return f"{kind} {['?' if not isinstance(dim, int) else dim for dim in shape]}"
