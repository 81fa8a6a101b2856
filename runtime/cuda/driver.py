"""The few calls of the CUDA driver that the executor makes: memory, copies, streams, events, graphs.

Straight through `cuda.bindings`, whose names have been the same for years; `cuda.core` gives the device's primary
context and launches kernels. Addresses and handles are plain integers.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.errors import EngineError

from .kernels import cuda_core

__all__ = ["CudaDriver", "Driver", "Graph", "RowCopy", "free_memory", "host_bytes", "no_collection"]

_DLPACK_CUDA = 2


@dataclass(frozen=True)
class RowCopy:
    """`rows` rows of `width` bytes each; a pitch is the distance in bytes from a row to the next."""

    target: int
    target_pitch: int
    source: int
    source_pitch: int
    width: int
    rows: int


class Driver(Protocol):
    """What the executor needs of a GPU. Everything with a stream is asynchronous."""

    @property
    def dlpack_device(self) -> tuple[int, int]:
        """The device as DLPack names it: type and number."""

    def enter(self) -> None:
        """Make the device current in this thread, whatever was current before."""

    def alloc(self, nbytes: int) -> int:
        """Device memory, at a multiple of 256."""

    def free(self, address: int) -> None:
        """Give device memory back."""

    def alloc_pinned(self, nbytes: int) -> int:
        """Host memory that copies to and from the device do not wait for."""

    def free_pinned(self, address: int) -> None:
        """Give pinned memory back."""

    def create_stream(self) -> int:
        """A stream that does not wait for the default one."""

    def create_event(self) -> int:
        """An event; a thread that waits for it sleeps."""

    def destroy(self, streams: list[int], events: list[int]) -> None:
        """Destroy streams and events."""

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy between any two addresses."""

    def copy_rows(self, copy: RowCopy, stream: int) -> None:
        """Copy rows between device addresses."""

    def zero(self, address: int, nbytes: int, stream: int) -> None:
        """Set bytes to zero."""

    def record(self, event: int, stream: int) -> None:
        """The event completes when what is on the stream now has run."""

    def wait(self, stream: int, event: int) -> None:
        """What is put on the stream from now on runs after the event."""

    def is_done(self, event: int) -> bool:
        """Whether the event has completed, or was never recorded."""

    def sync_event(self, event: int) -> None:
        """Wait for the event."""

    def sync(self, stream: int) -> None:
        """Wait for everything on the stream."""

    def capture(self, enqueue: Callable[[], None], stream: int) -> Graph:
        """Record what `enqueue` puts on `stream`, and upload it."""

    def upload(self, executable: int, stream: int) -> None:
        """Put what launches of a `CUgraphExec` need onto the device, behind what is on `stream`.

        Its first launch would do it otherwise, and allocate.
        """

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the device."""


def free_memory(ordinal: int = 0) -> int:
    """Bytes of memory that are free on a device.

    Raises:
        EngineError: there is none.
    """
    return CudaDriver(ordinal).memory()[0]


def host_bytes(address: int, nbytes: int) -> NDArray[np.uint8]:
    """Host memory as an array, without a copy; it must stay allocated."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


@contextmanager
def no_collection() -> Iterator[None]:
    """Keeps the garbage collector from running: in a capture, freeing what somebody left behind would spoil it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Graph:
    """An executable CUDA graph: a `Recording`."""

    def __init__(self, launch: Callable[[int], None], close: Callable[[], None]) -> None:
        self._launch = launch
        self._close = close

    def launch(self, stream: int) -> None:
        """Enqueue it on `stream`."""
        self._launch(stream)

    def close(self) -> None:
        """Destroy it."""
        self._close()


class CudaDriver:
    """Implements `Driver` for one device, in its primary context."""

    def __init__(self, ordinal: int = 0) -> None:
        """Enter the device.

        Raises:
            EngineError: there is no such device, or no driver or bindings for it.
        """
        self._core = core = cuda_core()
        from cuda.bindings import driver

        self._cuda = driver
        try:
            self.device: Any = core.Device(ordinal)
            self.device.set_current()
        except Exception as error:  # the libraries' own errors, none of which is public
            raise EngineError(
                f"no CUDA device {ordinal} can be used here: {error}; run on a machine with an NVIDIA GPU and driver, "
                f"or use a bundle for the CPU"
            ) from error
        self.ordinal = ordinal
        self._context = int(self._call("cuCtxGetCurrent"))

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability of the device."""
        major, minor = self.device.compute_capability
        return int(major), int(minor)

    @property
    def dlpack_device(self) -> tuple[int, int]:
        """See `Driver`."""
        return _DLPACK_CUDA, self.ordinal

    def enter(self) -> None:
        """See `Driver`."""
        if int(self._call("cuCtxGetCurrent")) != self._context:
            # Not `self.device`: before release 1.0 of cuda.core, a device belongs to the thread that asked for it.
            self._core.Device(self.ordinal).set_current()

    def alloc(self, nbytes: int) -> int:
        """See `Driver`."""
        return int(self._call("cuMemAlloc", nbytes))

    def free(self, address: int) -> None:
        """See `Driver`."""
        self._call("cuMemFree", address)

    def alloc_pinned(self, nbytes: int) -> int:
        """See `Driver`."""
        return int(self._call("cuMemHostAlloc", nbytes, self._cuda.CU_MEMHOSTALLOC_PORTABLE))

    def free_pinned(self, address: int) -> None:
        """See `Driver`."""
        self._call("cuMemFreeHost", address)

    def create_stream(self) -> int:
        """See `Driver`."""
        return int(self._call("cuStreamCreate", self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING.value))

    def create_event(self) -> int:
        """See `Driver`."""
        flags = self._cuda.CUevent_flags
        return int(
            self._call(
                "cuEventCreate", flags.CU_EVENT_DISABLE_TIMING.value | flags.CU_EVENT_BLOCKING_SYNC.value
            )
        )

    def destroy(self, streams: list[int], events: list[int]) -> None:
        """See `Driver`."""
        for event in events:
            self._call("cuEventDestroy", event)
        for stream in streams:
            self._call("cuStreamDestroy", stream)

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """See `Driver`."""
        self._call("cuMemcpyAsync", target, source, nbytes, stream)

    def copy_rows(self, copy: RowCopy, stream: int) -> None:
        """See `Driver`."""
        what = self._cuda.CUDA_MEMCPY2D()
        what.srcMemoryType = self._cuda.CUmemorytype.CU_MEMORYTYPE_DEVICE
        # The device's memory, or pinned memory of the host: the address tells.
        what.dstMemoryType = self._cuda.CUmemorytype.CU_MEMORYTYPE_UNIFIED
        what.srcDevice, what.srcPitch = copy.source, copy.source_pitch
        what.dstDevice, what.dstPitch = copy.target, copy.target_pitch
        what.WidthInBytes, what.Height = copy.width, copy.rows
        self._call("cuMemcpy2DAsync", what, stream)

    def zero(self, address: int, nbytes: int, stream: int) -> None:
        """See `Driver`."""
        self._call("cuMemsetD8Async", address, 0, nbytes, stream)

    def record(self, event: int, stream: int) -> None:
        """See `Driver`."""
        self._call("cuEventRecord", event, stream)

    def wait(self, stream: int, event: int) -> None:
        """See `Driver`."""
        self._call("cuStreamWaitEvent", stream, event, 0)

    def is_done(self, event: int) -> bool:
        """See `Driver`."""
        (status,) = self._cuda.cuEventQuery(event)
        if status == self._cuda.CUresult.CUDA_ERROR_NOT_READY:
            return False
        self._check("cuEventQuery", status)
        return True

    def sync_event(self, event: int) -> None:
        """See `Driver`."""
        self._call("cuEventSynchronize", event)

    def sync(self, stream: int) -> None:
        """See `Driver`."""
        self._call("cuStreamSynchronize", stream)

    def capture(self, enqueue: Callable[[], None], stream: int) -> Graph:
        """See `Driver`. The mode is thread-local: other threads go on working with the device."""
        mode = self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", stream, mode)
        try:
            with no_collection():
                enqueue()
        except BaseException:
            _, graph = self._cuda.cuStreamEndCapture(stream)
            if graph is not None and int(graph):  # a capture that cannot end gives none
                self._cuda.cuGraphDestroy(graph)
            raise
        graph = self._call("cuStreamEndCapture", stream)
        try:
            executable = self._call("cuGraphInstantiate", graph, 0)
        finally:
            self._call("cuGraphDestroy", graph)
        recorded = Graph(
            lambda where: self._call("cuGraphLaunch", executable, where),
            lambda: self._call("cuGraphExecDestroy", executable),
        )
        try:
            self.upload(int(executable), stream)
        except BaseException:
            recorded.close()
            raise
        return recorded

    def upload(self, executable: int, stream: int) -> None:
        """See `Driver`."""
        self._call("cuGraphUpload", executable, stream)

    def memory(self) -> tuple[int, int]:
        """See `Driver`."""
        free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *results = getattr(self._cuda, name)(*arguments)
        self._check(name, status)
        if len(results) == 1:
            return results[0]
        return tuple(results) if results else None

    def _check(self, name: str, status: Any) -> None:
        if status == self._cuda.CUresult.CUDA_SUCCESS:
            return
        _, text = self._cuda.cuGetErrorString(status)
        said = text.decode() if isinstance(text, bytes) else str(text)
        raise EngineError(
            f"{name} failed on CUDA device {self.ordinal}: {said} ({status!r}). An error of an earlier launch may "
            f"show here; CUDA_LAUNCH_BLOCKING=1 tells which"
        )
