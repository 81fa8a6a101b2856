"""A GPU made of host memory and queues, to test what the CUDA executor does with a real one's rules.

Work on a stream runs as late as it may: when a thread waits for it, or at a point that a seeded generator picks. So a
piece of pinned memory that is written too early, a missing event or a buffer that two streams share shows in the
results. During a capture nothing may be allocated and nobody may wait.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtime.bundle import Bundle
from runtime.bundle.dtypes import numpy_dtype
from runtime.cuda.driver import Graph, RowCopy, host_bytes
from runtime.host.executor import KERNELS
from runtime.host.graph import load_graph
from runtime.host.persistent import PERSISTENT_KERNELS
from runtime.program.program import KernelLaunch

Work = Callable[[], None]


@dataclass
class _Event:
    stream: int = 0
    recorded: int = 0
    completed: int = 0


@dataclass
class _Stream:
    queue: deque[Work] = field(default_factory=deque)
    captured: list[Work] | None = None


class SimulatedDriver:
    """Implements runtime.cuda.driver.Driver; `eagerness` is the share of work that runs before it must."""

    def __init__(self, seed: int = 0, eagerness: float = 0.2) -> None:
        self._random = random.Random(seed)
        self._eagerness = eagerness
        self._lock = threading.RLock()
        self._memory: dict[int, np.ndarray] = {}
        self._streams: dict[int, _Stream] = {}
        self._events: dict[int, _Event] = {}
        self.allocations = 0
        self.captures = 0
        self.waits = 0

    dlpack_device = (1, 0)

    def enter(self) -> None:
        pass

    def alloc(self, nbytes: int) -> int:
        with self._lock:
            assert not any(stream.captured is not None for stream in self._streams.values())
            self.allocations += 1
            array = np.full(nbytes + 256, 0xFF, dtype=np.uint8)  # NaN in every type
            address = -(-array.ctypes.data // 256) * 256
            self._memory[address] = array
            return address

    def free(self, address: int) -> None:
        del self._memory[address]

    alloc_pinned, free_pinned = alloc, free

    def create_stream(self) -> int:
        self._streams[len(self._streams) + 1] = _Stream()
        return len(self._streams)

    def create_event(self) -> int:
        self._events[len(self._events) + 1] = _Event()
        return len(self._events)

    def destroy(self, streams: list[int], events: list[int]) -> None:
        for stream in streams:
            assert not self._streams.pop(stream).queue, "destroyed with work on it"
        for event in events:
            del self._events[event]

    def push(self, stream: int, work: Work) -> None:
        """Put work on a stream."""
        with self._lock:
            target = self._streams[stream]
            if target.captured is not None:
                target.captured.append(work)
                return
            target.queue.append(work)
            while self._random.random() < self._eagerness:
                self._step(self._random.choice(list(self._streams)))

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self.push(stream, lambda: ctypes.memmove(target, source, nbytes) and None)

    def copy_rows(self, copy: RowCopy, stream: int) -> None:
        def work() -> None:
            for row in range(copy.rows):
                target, source = copy.target + row * copy.target_pitch, copy.source + row * copy.source_pitch
                ctypes.memmove(target, source, copy.width)

        self.push(stream, work)

    def zero(self, address: int, nbytes: int, stream: int) -> None:
        self.push(stream, lambda: ctypes.memset(address, 0, nbytes) and None)

    def record(self, event: int, stream: int) -> None:
        with self._lock:
            marker = self._events[event]
            marker.stream, marker.recorded = stream, marker.recorded + 1
            count = marker.recorded
            self.push(stream, lambda: setattr(marker, "completed", count))

    def wait(self, stream: int, event: int) -> None:
        with self._lock:
            marker = self._events[event]
            count = marker.recorded
            self.push(stream, lambda: self._until(marker, count))

    def is_done(self, event: int) -> bool:
        with self._lock:
            return self._events[event].completed == self._events[event].recorded

    def sync_event(self, event: int) -> None:
        with self._lock:
            self.waits += 1
            self._must_not_capture()
            self._until(self._events[event], self._events[event].recorded)

    def sync(self, stream: int) -> None:
        with self._lock:
            self._must_not_capture()
            while self._streams[stream].queue:
                self._step(stream)

    def capture(self, enqueue: Callable[[], None], stream: int) -> Graph:
        with self._lock:
            target = self._streams[stream]
            assert target.captured is None
            target.captured = []
            try:
                enqueue()
                work = target.captured
            finally:
                target.captured = None
            self.captures += 1

        def launch(where: int) -> None:
            with self._lock:
                for part in work:
                    self.push(where, part)

        return Graph(launch, work.clear)

    def upload(self, executable: int, stream: int) -> None:
        raise AssertionError("what this driver captures is uploaded by itself")

    def memory(self) -> tuple[int, int]:
        return 1 << 40, 1 << 40

    def _must_not_capture(self) -> None:
        assert not any(stream.captured is not None for stream in self._streams.values())

    def _step(self, stream: int) -> None:
        if not self._streams[stream].queue:
            return
        try:
            self._streams[stream].queue.popleft()()
        except BaseException:  # a device that has failed does nothing any more
            for target in self._streams.values():
                target.queue.clear()
            for event in self._events.values():
                event.completed = event.recorded
            raise

    def _until(self, marker: _Event, count: int) -> None:
        while marker.completed < count:
            assert self._streams[marker.stream].queue, "waits for an event that nothing completes"
            self._step(marker.stream)


class SimulatedLibrary:
    """Implements runtime.cuda.library.ComponentLibrary with the host's graphs."""

    def __init__(self, bundle: Bundle, driver: SimulatedDriver) -> None:
        self._bundle = bundle
        self._driver = driver

    def load(self, name: str) -> SimulatedComponent:
        return SimulatedComponent(self._bundle, name, self._driver)

    def record(self, enqueue: Callable[[], None], stream: int) -> Graph:
        return self._driver.capture(enqueue, stream)

    def close(self) -> None:
        pass


class SimulatedComponent:
    scratch_bytes = 0
    slots = 0
    """Slots of the pool, set by the test."""

    def __init__(self, bundle: Bundle, name: str, driver: SimulatedDriver) -> None:
        self._graph = load_graph(bundle, name, 1)
        self._driver = driver

    def enqueue(self, addresses: Mapping[str, int], scratch: int, stream: int) -> None:
        graph, slots = self._graph, self.slots
        arrays = {}
        for specs in (graph.inputs, graph.outputs):
            for name, spec in specs.items():
                shape = [slots if isinstance(dim, str) else dim for dim in spec.shape]
                arrays[name] = array_at(addresses[name], spec.dtype, shape)
        binding = graph.bind(arrays, arrays)
        self._driver.push(stream, lambda: graph.run(binding) and None)


def array_at(address: int, dtype: Any, shape: list[int] | tuple[int, ...]) -> np.ndarray:
    """Memory of the simulated device as an array."""
    size = int(np.prod(shape, dtype=np.int64)) * numpy_dtype(dtype).itemsize
    return host_bytes(address, size).view(numpy_dtype(dtype)).reshape(shape)


def launcher(driver: SimulatedDriver) -> Callable[[KernelLaunch, Mapping[str, int], int], None]:
    """The kernels of the cache, in numpy."""

    def launch(operation: KernelLaunch, addresses: Mapping[str, int], stream: int) -> None:
        arrays = {
            name: array_at(addresses[name], view.dtype, view.shape)
            for name, view in operation.buffers.items()
        }
        if operation.kernel in PERSISTENT_KERNELS:
            driver.push(stream, lambda: PERSISTENT_KERNELS[operation.kernel](arrays, launch=operation))
        else:
            driver.push(stream, lambda: KERNELS[operation.kernel](arrays))

    return launch
