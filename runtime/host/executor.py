"""Executes a program on the host: components are graphs, buffers arrays, and the kernels of the cache numpy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Bundle
from runtime.bundle.dtypes import numpy_dtype
from runtime.bundle.e4m3 import narrow, widen
from runtime.bundle.weights_file import WeightsFile
from runtime.errors import EngineError
from runtime.program.program import Copy, EngineRun, Fill, Operation, Program, Queue, View

from .graph import Graph, load_graph
from .onnxruntime import default_threads
from .persistent import PERSISTENT_KERNELS

__all__ = ["KERNELS", "HostExecutor"]

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class _Fetched:
    """A copy of a buffer: what is fetched next may use the buffer before this one is asked for."""

    array: NDArray[Any]

    def into(self, out: NDArray[Any]) -> float:
        np.copyto(out, self.array, casting="unsafe")
        return 0.0

    def arrived(self) -> NDArray[Any]:
        """See `Fetch`."""
        return self.array


class HostExecutor:
    """Implements `Executor`; everything has run when a call returns.

    Each component is loaded once, with `threads` threads per forward (default: `default_threads`). Weights are
    read into memory once, so that they stay what they were; all operations are bound to their arrays when this is made,
    so a forward allocates nothing.

    Raises:
        BundleError: a component is another graph than the manifest says.
        EngineError: a component does not load, or the program needs a GPU.
    """

    def __init__(self, bundle: Bundle, program: Program, *, threads: int | None = None) -> None:
        self._program = program
        self._weights = _read_weights(bundle, program)
        names = dict.fromkeys(run.component for _, run in program.walk() if isinstance(run, EngineRun))
        self._graphs: dict[str, Graph] = {
            name: load_graph(bundle, name, threads or default_threads()) for name in names
        }
        owned = [{}, *({} for _ in range(program.sessions))]  # type: list[Arrays]
        for name, placed in program.buffers.items():
            if name == "weights" or name.startswith("encoder."):
                continue
            for session in range(program.sessions) if placed.per_session else (-1,):
                array = np.zeros(placed.buffer.shape, dtype=numpy_dtype(placed.buffer.dtype))
                owned[session + 1][name] = array
        self._arrays = owned
        for row in range(bundle.manifest.schedule.row_count):
            owned[0][f"step.{row}"][...] = row
        self._runs = [
            {
                name: [self._bind(operation, session) for operation in forward.operations]
                for name, forward in program.forwards.items()
                if name not in ("load", "encode_text_layer")
            }
            for session in range(program.sessions)
        ]
        self._text: Arrays = {}

    @contextmanager
    def feed(self, session: int, forward: str) -> Iterator[Mapping[str, NDArray[Any]]]:
        """See `Executor.feed`."""
        yield {view.buffer: self.array(view, session) for view in self._program.forwards[forward].feeds}

    def send(self, session: int, forward: str, values: Mapping[str, NDArray[Any]]) -> None:
        """See `Executor.send`. Of the text encoder, nothing is copied."""
        if forward != "encode_text_layer":
            for view in self._program.forwards[forward].feeds:
                np.copyto(self.array(view, session), values[view.buffer], casting="unsafe")
            return
        self._text = {
            view.buffer: np.ascontiguousarray(values[view.buffer], dtype=numpy_dtype(view.dtype))
            for view in self._program.forwards[forward].feeds
        }

    def run(self, session: int, forward: str) -> float:
        """See `Executor.run`."""
        if forward == "encode_text_layer":
            inputs = {name.removeprefix("encoder."): array for name, array in self._text.items()}
            encoder = self._graphs["text_encoder"]
            outputs = {s.name: _empty(s.dtype, s.shape) for s in encoder.outputs.values()}
            seconds = encoder.run(encoder.bind(inputs, outputs))
            self._text = {f"encoder.{name}": array for name, array in outputs.items()}
            return seconds
        return sum(run() for run in self._runs[session][forward])

    def copy(self, session: int, copy: Copy, queue: Queue) -> None:
        """See `Executor.copy`."""
        np.copyto(self.array(copy.target, session), self.array(copy.source, session))

    def signal(self, session: int, latent: int) -> None:
        """Everything has run when a call returns."""

    def wait(self, session: int, latent: int) -> None:
        """Nothing is under way."""

    def fetch(self, session: int, view: View, queue: Queue, index: int = 0) -> _Fetched:
        """See `Executor.fetch`."""
        if queue == "text":
            return _Fetched(self._text[view.buffer])
        return _Fetched(self.array(view, session).copy())

    def read(self, session: int, view: View) -> NDArray[np.uint8]:
        """See `Executor.read`."""
        return self.array(view, session).reshape(-1).view(np.uint8).copy()

    def write(self, session: int, view: View, value: NDArray[np.uint8]) -> None:
        """See `Executor.write`."""
        self.array(view, session).reshape(-1).view(np.uint8)[...] = value

    def prepare(self, session: int) -> None:
        """Everything is bound already."""

    def close(self) -> None:
        """Drop the buffers and the graphs. May be called twice."""
        self._runs.clear()
        self._arrays.clear()
        self._graphs.clear()
        self._weights.clear()

    def array(self, view: View, session: int = 0) -> NDArray[Any]:
        """The array of a view: part of a buffer's, without a copy."""
        if view.buffer == "weights":
            return self._weights[view.offset]
        placed = self._program.buffers[view.buffer]
        whole = self._arrays[session + 1 if placed.per_session else 0][view.buffer]
        dtype = numpy_dtype(view.dtype)
        flat = whole.reshape(-1).view(np.uint8)[view.offset : view.offset + view.extent]
        if view.pitch is None:
            return flat.view(dtype).reshape(view.shape)
        strides = [dtype.itemsize]
        for size in view.shape[:1:-1]:
            strides.insert(0, strides[0] * size)
        return np.lib.stride_tricks.as_strided(flat.view(dtype), view.shape, (view.pitch, *strides))

    def _bind(self, operation: Operation, session: int) -> Callable[[], float]:
        """The operation on the arrays of one session; calling it gives the seconds it took."""

        def arrays(views: Mapping[str, View]) -> Arrays:
            return {name: self.array(view, session) for name, view in views.items()}

        if isinstance(operation, EngineRun):
            graph = self._graphs[operation.component]
            binding = graph.bind(arrays(operation.inputs), arrays(operation.outputs))
            return lambda: graph.run(binding)
        if isinstance(operation, Fill):
            target = self.array(operation.target, session)
            return lambda: _timed(lambda: target.fill(0))
        if isinstance(operation, Copy):
            copied = arrays({"source": operation.source, "target": operation.target})
            return lambda: _timed(lambda: np.copyto(copied["target"], copied["source"]))
        kernel = KERNELS.get(operation.kernel)
        if operation.kernel == "rope_sink_fp8":
            kernel = partial(_rope_sink_fp8, block=operation.problem.block_k)
        elif operation.kernel in PERSISTENT_KERNELS:
            kernel = partial(PERSISTENT_KERNELS[operation.kernel], launch=operation)
        if kernel is None:
            raise EngineError(
                f"kernel {operation.kernel!r} runs on a GPU only; a bundle for the host holds a graph in its place"
            )
        buffers = arrays(operation.buffers)
        return lambda: _timed(lambda: kernel(buffers))


def _read_weights(bundle: Bundle, program: Program) -> dict[int, NDArray[Any]]:
    """The tensors of the weights file that the program uses, by their place in its memory."""
    segments = bundle.manifest.segments
    if segments is None:
        return {}
    with WeightsFile(bundle.opened(segments.weights)) as file:
        weights = {view.offset: file.read_finite(name) for name, view in program.weights.items()}
        file.check()
    return weights


def _timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _empty(dtype: Any, shape: tuple[int | str, ...]) -> NDArray[Any]:
    return np.empty([int(dim) for dim in shape], dtype=numpy_dtype(dtype))


_STAGED = {
    "past_k": "k",
    "past_v": "v",
    "past_kmean": "k_mean",
    "past_kscale": "k_scale",
    "past_vscale": "v_scale",
}


def _commit(arrays: Arrays) -> None:
    """The kernels `commit` and `commit_fp8`, see docs/kernels.md."""
    for past, staged in _STAGED.items():
        if past not in arrays:
            continue
        pool = arrays[past]
        frames = arrays[staged].reshape(-1, *pool.shape[1:])
        for frame, slot in enumerate(arrays["commit_slots"]):
            if slot >= 0:
                pool[slot] = frames[frame]


def _rope_sink(arrays: Arrays) -> None:
    """The kernel `rope_sink`, see docs/kernels.md."""
    for past, kept in (("past_k", "sink_k"), ("past_kmean", "sink_kmean")):
        for sink, slot in enumerate(arrays["sink_slots"]):
            if slot < 0:
                continue
            _turn(arrays[kept][sink], arrays[past][slot], arrays["cos"][sink], arrays["sin"][sink])


def _turn(source: NDArray[Any], target: NDArray[Any], cos: NDArray[Any], sin: NDArray[Any]) -> None:
    turned = 2 * len(cos)
    even = source[..., 0:turned:2].astype(np.float32)
    odd = source[..., 1:turned:2].astype(np.float32)
    target[..., 0:turned:2] = even * cos - odd * sin
    target[..., 1:turned:2] = even * sin + odd * cos
    target[..., turned:] = source[..., turned:]


def _rope_sink_fp8(arrays: Arrays, block: int) -> None:
    """The kernel `rope_sink_fp8`: what the codes stand for is turned and rounded once more."""
    for sink, slot in enumerate(arrays["sink_slots"]):
        if slot < 0:
            continue
        cos, sin = arrays["cos"][sink], arrays["sin"][sink]
        _turn(arrays["sink_kmean"][sink], arrays["past_kmean"][slot], cos, sin)
        keys = widen(arrays["sink_k"][sink], arrays["sink_kscale"][sink], block)
        turned = np.empty_like(keys)
        _turn(keys, turned, cos, sin)
        arrays["past_k"][slot], arrays["past_kscale"][slot] = narrow(turned, block)


KERNELS: Mapping[str, Callable[[Arrays], None]] = {
    "commit": _commit,
    "commit_fp8": _commit,
    "rope_sink": _rope_sink,
}
"""The kernels of the cache on arrays named as their buffers."""
