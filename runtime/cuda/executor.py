"""Executes a program on a GPU: one arena, three streams, and a CUDA graph for every kind of forward and session.

Graphs hold addresses, so each session has graphs of its own: recording them costs milliseconds when the pipeline is
loaded and a few kilobytes each, while one graph for all sessions would have to copy a session's cross-attention keys
and values and the decoder's caches (hundreds of megabytes) at every turn. What changes from chunk to chunk lies at
fixed addresses that are fed by copies in stream order, from pinned memory that is not reused before its copy has run.

Nothing is allocated after loading, and nothing waits for the device but `_Fetched.into`, and a feed that is more
than a ring's length ahead.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.dtypes import numpy_dtype
from runtime.errors import EngineError
from runtime.frames import FramePool
from runtime.program.program import (
    ALIGNMENT,
    Copy,
    EngineRun,
    Fill,
    KernelLaunch,
    Operation,
    Program,
    Queue,
    View,
)

from .driver import Driver, RowCopy, host_bytes
from .library import ComponentLibrary, DeviceComponent, Recording

__all__ = ["CudaCounters", "CudaExecutor", "LaunchKernel"]

LaunchKernel = Callable[[KernelLaunch, Mapping[str, int], int], None]
"""Enqueues a kernel: the launch, the addresses of its buffers, the stream."""

_QUEUES: Final[tuple[Queue, ...]] = ("forward", "decode", "text")
_RING: Final = 8
"""Feeds that may be under way: a chunk takes four, a prompt switch two more for each resident chunk."""
_PIECE: Final = 16 << 20
"""Bytes of each of the two pinned pieces that weights pass through."""
_SENT: Final = ("load", "encode_text_layer", "encode_first", "encode_next.a", "encode_next.b")
"""Fed with large arrays, in pieces."""
_EAGER: Final = ("reset", *_SENT)
"""Run too seldom to be worth a graph."""


@dataclass
class CudaCounters:
    """What has happened since the pipeline was loaded. Plain numbers, read them as differences.

    `waits` counts the times the host waited for the device: once per fetched piece of video, and each feed that had
    to wait for room. `operations` counts what was enqueued one by one, and not by a graph.
    """

    graph_launches: int = 0
    operations: int = 0
    copies: int = 0
    waits: int = 0


@dataclass
class _Slot:
    """A piece of pinned memory, and the event after which it may be written again."""

    address: int
    memory: NDArray[np.uint8]
    event: int


class _Fetched:
    """Bytes on their way into pinned memory."""

    def __init__(self, executor: CudaExecutor, slot: _Slot, view: View) -> None:
        self._executor = executor
        self._slot = slot
        self._view = view

    def into(self, out: NDArray[Any]) -> float:
        """See `Fetch`."""
        start = time.perf_counter()
        self._executor.counters.waits += 1
        self._executor.driver.sync_event(self._slot.event)
        seconds = time.perf_counter() - start
        np.copyto(out, self.arrived().reshape(out.shape), casting="unsafe")
        return seconds

    def arrived(self) -> NDArray[Any]:
        """See `Fetch`."""
        view = self._view
        return self._slot.memory[: view.nbytes].view(numpy_dtype(view.dtype)).reshape(view.shape)


class CudaExecutor:
    """Implements `Executor`.

    `constants` are the values of what `load` feeds. Without `graphs`, every run of a forward enqueues its
    operations one by one.
    """

    def __init__(
        self,
        program: Program,
        driver: Driver,
        library: ComponentLibrary,
        launch: LaunchKernel,
        constants: Mapping[str, NDArray[Any]],
        *,
        graphs: bool = True,
    ) -> None:
        self.counters = CudaCounters()
        self.driver = driver
        self._program = program
        self._library = library
        self.launch = launch
        self._streams: dict[Queue, int] = {}
        # A session may be reset while another is decoded, in the same queue.
        self._locks = {queue: threading.Lock() for queue in _QUEUES}
        self._events: list[int] = []
        self._pinned: list[int] = []
        self._graphs: dict[tuple[int, str], Recording] = {}
        self._components: dict[str, DeviceComponent] = {}
        self._ran: set[str] = set()
        self._with_graphs = graphs
        self._frames = FramePool(driver.alloc, _chunk_bytes(program))
        self._base = 0
        self._closed = False
        try:
            driver.enter()
            for queue in _QUEUES:
                self._streams[queue] = driver.create_stream()
            self._base = driver.alloc(program.arena_bytes)
            self._load_components()
            feeds = max(_padded(forward.feeds) for forward in program.forwards.values() if _is_fed(forward))
            self._ring = [self._slot(feeds) for _ in range(_RING)]
            self._pieces = [self._slot(_PIECE) for _ in range(2)]
            self._next = {"ring": 0, "piece": 0}
            self._fetches = self._fetch_slots()
            self._decoded = self._event()
            self._latents = [
                [self._event() for _ in range(program.latent_slots)] for _ in range(program.sessions)
            ]
            self._fill(constants)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def feed(self, session: int, forward: str) -> Iterator[Mapping[str, NDArray[Any]]]:
        """See `Executor.feed`. One thread feeds."""
        self.driver.enter()
        views = self._program.forwards[forward].feeds
        stream = self._streams[self._program.forwards[forward].queue]
        slot = self._turn("ring", self._ring)
        arrays, copies, start = {}, [], 0
        for view in views:
            piece = slot.memory[start : start + view.nbytes]
            arrays[view.buffer] = piece.view(numpy_dtype(view.dtype)).reshape(view.shape)
            copies.append((self.address(view, session), slot.address + start, view.nbytes))
            start += _aligned(view.nbytes)
        yield arrays
        for target, source, nbytes in copies:
            self.driver.copy(target, source, nbytes, stream)
        self.counters.copies += len(copies)
        self.driver.record(slot.event, stream)

    def send(self, session: int, forward: str, values: Mapping[str, NDArray[Any]]) -> None:
        """See `Executor.send`."""
        self.driver.enter()
        stream = self._streams[self._program.forwards[forward].queue]
        for view in self._program.forwards[forward].feeds:
            self._upload(self.address(view, session), values[view.buffer], view, stream)

    def run(self, session: int, forward: str) -> float:
        """See `Executor.run`.

        The first run of each forward, for any session, enqueues its operations one by one, so that libraries can do
        what they do once; later ones replay a graph.
        """
        start = time.perf_counter()
        self.driver.enter()
        queue = self._program.forwards[forward].queue
        with self._locks[queue]:
            if not self._with_graphs or forward in _EAGER or forward not in self._ran:
                self._enqueue(session, forward)
                self._ran.add(forward)
                self.counters.operations += len(self._program.forwards[forward].operations)
            else:
                self._recorded(session, forward).launch(self._streams[queue])
                self.counters.graph_launches += 1
        return time.perf_counter() - start

    def copy(self, session: int, copy: Copy, queue: Queue) -> None:
        """See `Executor.copy`."""
        self.driver.enter()
        with self._locks[queue]:
            self._operation(copy, session, self._streams[queue])
        self.counters.copies += 1

    def signal(self, session: int, latent: int) -> None:
        """See `Executor.signal`."""
        self.driver.enter()
        self.driver.record(self._latents[session][latent], self._streams["forward"])

    def wait(self, session: int, latent: int) -> None:
        """See `Executor.wait`."""
        self.driver.enter()
        self.driver.wait(self._streams["decode"], self._latents[session][latent])

    def fetch(self, session: int, view: View, queue: Queue, index: int = 0) -> _Fetched:
        """See `Executor.fetch`."""
        self.driver.enter()
        slot, source, stream = self._fetches[queue, index], self.address(view, session), self._streams[queue]
        if view.pitch is None:
            self.driver.copy(slot.address, source, view.nbytes, stream)
        else:
            rows, width = view.shape[0], view.nbytes // view.shape[0]
            self.driver.copy_rows(RowCopy(slot.address, width, source, view.pitch, width, rows), stream)
        self.driver.record(slot.event, self._streams[queue])
        self.counters.copies += 1
        return _Fetched(self, slot, view)

    def keep(self, session: int, buffer: str, address: int) -> None:
        """Enqueue a copy of a decoder's output to memory outside of the arena."""
        self.driver.enter()
        view = self._program.buffers[buffer].view
        self.driver.copy(address, self.address(view, session), view.nbytes, self._streams["decode"])
        self.counters.copies += 1

    def finish_decoding(self) -> float:
        """Wait for what is enqueued in queue `decode`; the seconds it took."""
        start = time.perf_counter()
        self.counters.waits += 1
        self.driver.record(self._decoded, self._streams["decode"])
        self.driver.sync_event(self._decoded)
        return time.perf_counter() - start

    def lease_frames(self) -> Any:
        """Device memory for the frames of one chunk, see `FramePool`."""
        self.driver.enter()
        return self._frames.lease()

    def read(self, session: int, view: View) -> NDArray[np.uint8]:
        """See `Executor.read`."""
        self.driver.enter()
        self.sync()
        value = np.empty(view.nbytes, dtype=np.uint8)
        stream = self._streams["forward"]
        self.driver.copy(value.ctypes.data, self.address(view, session), view.nbytes, stream)
        self.driver.sync(stream)
        return value

    def write(self, session: int, view: View, value: NDArray[np.uint8]) -> None:
        """See `Executor.write`."""
        self.driver.enter()
        self.sync()
        stream = self._streams["forward"]
        self.driver.copy(self.address(view, session), value.ctypes.data, view.nbytes, stream)
        self.driver.sync(stream)

    def prepare(self, session: int) -> None:
        """Record every forward of `session` that has a graph; without graphs, run what has not run yet."""
        self.driver.enter()
        for name, forward in self._program.forwards.items():
            if name in _EAGER or not forward.operations:
                continue
            if name not in self._ran:
                self._enqueue(session, name)
                self._ran.add(name)
            if self._with_graphs:
                self._recorded(session, name)
        self.sync()

    def sync(self) -> None:
        """Wait for everything."""
        for stream in self._streams.values():
            self.driver.sync(stream)

    def component(self, name: str) -> DeviceComponent:
        """A loaded component."""
        return self._components[name]

    def address(self, view: View, session: int) -> int:
        """Device address of `view` for `session`."""
        return self._base + self._program.offset(view, session)

    def close(self) -> None:
        """Wait for the device and free everything. May be called twice; a device that has failed frees nothing."""
        if self._closed:
            return
        self._closed = True
        driver = self.driver
        steps = [driver.enter, self.sync]
        steps += [graph.close for graph in self._graphs.values()]
        steps += [
            self._components.clear,
            self._library.close,
            partial(driver.destroy, list(self._streams.values()), self._events),
        ]
        steps += [partial(driver.free_pinned, address) for address in self._pinned]
        steps += [partial(driver.free, address) for address in (*self._frames.owned, self._base) if address]
        for step in steps:
            with suppress(EngineError, RuntimeError):  # the latter is PyTorch's; the next steps are still due
                step()
        self._graphs.clear()

    def _load_components(self) -> None:
        components = self._components
        for _, operation in self._program.walk():
            if not isinstance(operation, EngineRun):
                continue
            name = operation.component
            if name not in components:
                components[name] = self._library.load(name)
            given = operation.scratch.nbytes if operation.scratch else 0
            if components[name].scratch_bytes > given:
                raise EngineError(
                    f"component {name!r} wants {components[name].scratch_bytes:,} bytes of activation memory, the "
                    f"manifest promises it {given:,}; rebuild the bundle"
                )

    def _fill(self, constants: Mapping[str, NDArray[Any]]) -> None:
        """Constants and weights; `weights.NAME` is a tensor of the weights file."""
        load = self._program.forwards["load"]
        stream = self._streams[load.queue]
        self._enqueue(0, "load")
        views = {view.buffer: view for view in load.feeds if view.buffer != "weights"}
        views |= {f"weights.{name}": view for name, view in self._program.weights.items()}
        for name, view in views.items():
            self._upload(self.address(view, 0), constants[name], view, stream)
        self.sync()

    def _upload(self, address: int, array: NDArray[Any], view: View, stream: int) -> None:
        """Copy an array in pieces, through pinned memory, in stream order."""
        value = np.ascontiguousarray(array).astype(numpy_dtype(view.dtype), copy=False)
        raw = value.reshape(-1).view(np.uint8)
        if raw.nbytes != view.nbytes:
            raise EngineError(
                f"buffer {view.buffer!r} takes {view.nbytes:,} bytes {list(view.shape)} and was given {raw.nbytes:,} "
                f"{list(array.shape)}"
            )
        for start in range(0, raw.nbytes, _PIECE):
            part = raw[start : start + _PIECE]
            slot = self._turn("piece", self._pieces)
            slot.memory[: part.nbytes] = part
            self.driver.copy(address + start, slot.address, part.nbytes, stream)
            self.driver.record(slot.event, stream)

    def _turn(self, kind: str, slots: list[_Slot]) -> _Slot:
        """The slot that has waited longest, once its last copy has run."""
        slot = slots[self._next[kind] % len(slots)]
        self._next[kind] += 1
        if not self.driver.is_done(slot.event):
            self.counters.waits += 1
            self.driver.sync_event(slot.event)
        return slot

    def _recorded(self, session: int, forward: str) -> Recording:
        graph = self._graphs.get((session, forward))
        if graph is None:
            operations = self._program.forwards[forward].operations
            stream = self._streams[self._program.forwards[forward].queue]
            engines = any(isinstance(operation, EngineRun) for operation in operations)
            record = self._library.record if engines else self.driver.capture
            graph = record(lambda: self._enqueue(session, forward), stream)
            self._graphs[session, forward] = graph
        return graph

    def _enqueue(self, session: int, forward: str) -> None:
        stream = self._streams[self._program.forwards[forward].queue]
        for operation in self._program.forwards[forward].operations:
            self._operation(operation, session, stream)

    def _operation(self, operation: Operation, session: int, stream: int) -> None:
        if isinstance(operation, EngineRun):
            addresses = {name: self.address(view, session) for name, view in operation.tensors.items()}
            scratch = self.address(operation.scratch, session) if operation.scratch else 0
            self._components[operation.component].enqueue(addresses, scratch, stream)
        elif isinstance(operation, KernelLaunch):
            addresses = {name: self.address(view, session) for name, view in operation.buffers.items()}
            self.launch(operation, addresses, stream)
        elif isinstance(operation, Fill):
            self.driver.zero(self.address(operation.target, session), operation.target.nbytes, stream)
        else:
            source, target = operation.source, operation.target
            to, at = self.address(target, session), self.address(source, session)
            if source.pitch is None and target.pitch is None:
                self.driver.copy(to, at, source.nbytes, stream)
            else:
                rows = (source if source.pitch is not None else target).shape[0]
                width = source.nbytes // rows
                copy = RowCopy(to, target.pitch or width, at, source.pitch or width, width, rows)
                self.driver.copy_rows(copy, stream)

    def _event(self) -> int:
        event = self.driver.create_event()
        self._events.append(event)
        return event

    def _slot(self, nbytes: int) -> _Slot:
        address = self.driver.alloc_pinned(max(1, nbytes))
        self._pinned.append(address)
        return _Slot(address, host_bytes(address, max(1, nbytes)), self._event())

    def _fetch_slots(self) -> dict[tuple[Queue, int], _Slot]:
        """One for each run of the decoder in a chunk, one for its latent, one for what is left of it in the decoder's
        caches, and one for the text encoder.
        """
        buffers = {name: placed.buffer for name, placed in self._program.buffers.items()}
        video = max(buffers["frames_first"].nbytes, buffers["frames_next"].nbytes)
        latent = buffers["clean_latent"]
        slots = {("decode", i): self._slot(video) for i in range(latent.shape[1])}
        slots["decode", latent.shape[1]] = self._slot(latent.nbytes)
        witness = max(view.nbytes for view in self._program.decoder_witnesses)
        slots["decode", latent.shape[1] + 1] = self._slot(witness)
        slots["text", 0] = self._slot(buffers["encoder.hidden_out"].nbytes)
        return slots  # type: ignore[return-value]


def _chunk_bytes(program: Program) -> int:
    buffers = program.buffers
    return buffers["frames_next"].buffer.nbytes * buffers["clean_latent"].buffer.shape[1]


def _is_fed(forward: Any) -> bool:
    return forward.name not in _SENT


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _padded(views: tuple[View, ...]) -> int:
    return sum(_aligned(view.nbytes) for view in views)
