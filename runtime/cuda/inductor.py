"""Packages compiled by Inductor on a GPU: a `ComponentLibrary` that is PyTorch.

A package reads and writes tensors that PyTorch does not own: they are laid over the executor's arena. What it computes
in between lies in memory of PyTorch's allocator, which knows about streams and captures; therefore captures are
PyTorch's too, and the graphs of one stream, which never run at once, share one pool of that memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from runtime.bundle import Bundle, Component, Dtype, nbytes
from runtime.errors import EngineError
from runtime.host.inductor import load_package, require_torch

from .driver import Driver, no_collection

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .library import Recording

__all__ = ["InductorLibrary", "device_tensor"]


class _Memory:
    """Device memory of someone else, as PyTorch takes it: bytes, since the interface knows no bfloat16 and float8."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
        }


def device_tensor(address: int, dtype: Dtype, shape: tuple[int, ...], device: int) -> Tensor:
    """A tensor over device memory, which must stay in place; nothing is copied."""
    import torch

    raw = torch.as_tensor(_Memory(address, nbytes(dtype, shape)), device=f"cuda:{device}")
    return raw.view(getattr(torch, dtype)).view(shape)


class _Streams:
    """Streams of the executor as PyTorch's own."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._known: dict[int, torch.cuda.Stream] = {}
        self._pools: dict[int, Any] = {}

    def use(self, handle: int) -> Any:
        """A context in which PyTorch works on the stream."""
        import torch

        if handle not in self._known:
            self._known[handle] = torch.cuda.ExternalStream(  # type: ignore[no-untyped-call]
                handle, device=f"cuda:{self._device}"
            )
        return torch.cuda.stream(self._known[handle])

    def pool(self, handle: int) -> Any:
        """The memory that captures on the stream share."""
        import torch

        if handle not in self._pools:
            self._pools[handle] = torch.cuda.graph_pool_handle()
        return self._pools[handle]


class _Package:
    """One package, loaded: a `DeviceComponent`."""

    scratch_bytes = 0

    def __init__(self, name: str, component: Component, loader: Any, streams: _Streams, device: int) -> None:
        self._name = name
        self._specs = (*component.inputs, *component.outputs)
        self._loader = loader
        self._streams = streams
        self._device = device
        # Runs differ in addresses only, and there is a fixed number of them: one for each layer, step and session.
        self._bound: dict[tuple[int, ...], list[Tensor]] = {}

    def enqueue(self, addresses: Mapping[str, int], scratch: int, stream: int) -> None:
        """See `DeviceComponent.enqueue`."""
        del scratch
        key = tuple(addresses[spec.name] for spec in self._specs)
        try:
            if key not in self._bound:
                self._bound[key] = [
                    device_tensor(address, spec.dtype, tuple(int(dim) for dim in spec.shape), self._device)
                    for address, spec in zip(key, self._specs, strict=True)
                ]
            with self._streams.use(stream):
                self._loader.run(self._bound[key])
        except Exception as error:
            raise EngineError(f"component {self._name!r} failed: {error}") from error


class _Graph:
    """A CUDA graph recorded by PyTorch."""

    def __init__(self, graph: torch.cuda.CUDAGraph, streams: _Streams) -> None:
        self._graph = graph
        self._streams = streams

    def launch(self, stream: int) -> None:
        """Enqueue the work on `stream`."""
        try:
            with self._streams.use(stream):
                self._graph.replay()
        except RuntimeError as error:
            raise EngineError(f"a recorded forward does not start: {error}") from error

    def close(self) -> None:
        """Free it; no replay may be running."""
        self._graph.reset()


class _Workspaces:
    """cuBLAS keeps tens of megabytes for each stream it has worked on, also when the stream is gone.

    Graphs hold their addresses, so they are given back only when no library is open any more.
    """

    def __init__(self) -> None:
        self._users = 0
        self._lock = threading.Lock()

    def take(self) -> None:
        with self._lock:
            self._users += 1

    def give_back(self) -> None:
        import torch

        with self._lock:
            self._users -= 1
            if not self._users:
                torch._C._cuda_clearCublasWorkspaces()


_workspaces = _Workspaces()


class InductorLibrary:
    """Implements `ComponentLibrary` on the driver's device.

    Raises:
        EngineError: PyTorch is not the one that compiled the bundle, or sees no GPU.
        BundleError: the manifest does not say which one it is.
    """

    def __init__(self, bundle: Bundle, driver: Driver) -> None:
        require_torch(bundle)
        import torch

        if not torch.cuda.is_available():
            library = bundle.manifest.library
            needed = f" whose driver is {library.driver} or newer" if library and library.driver else ""
            raise EngineError(
                f"bundle {bundle.manifest.name!r} runs on a GPU, and PyTorch {torch.__version__} sees none; install a "
                f"CUDA build of it, or run the bundle where there is a GPU{needed}"
            )
        torch.cuda.init()  # type: ignore[no-untyped-call]  # packages and streams do not see to it themselves
        self._bundle = bundle
        self._driver = driver
        _, self._device = driver.dlpack_device
        self._streams = _Streams(self._device)
        _workspaces.take()

    def load(self, name: str) -> _Package:
        """See `ComponentLibrary.load`."""
        loader = load_package(self._bundle, name, device_index=self._device)
        return _Package(name, self._bundle.component(name), loader, self._streams, self._device)

    def record(self, enqueue: Callable[[], None], stream: int) -> Recording:
        """See `ComponentLibrary.record`.

        Raises:
            EngineError: PyTorch cannot record it.
        """
        import torch

        graph = torch.cuda.CUDAGraph()
        try:
            with self._streams.use(stream):
                graph.capture_begin(self._streams.pool(stream), capture_error_mode="thread_local")
                try:
                    with no_collection():
                        enqueue()
                except BaseException:
                    _abandon(graph)
                    raise
                graph.capture_end()
        except RuntimeError as error:
            raise EngineError(
                f"PyTorch {torch.__version__} cannot record a forward: {error}; Pipeline.load(..., graphs=False) runs "
                f"without recording"
            ) from error
        recorded = _Graph(graph, self._streams)
        try:
            self._driver.upload(graph.raw_cuda_graph_exec(), stream)
        except BaseException:
            recorded.close()
            raise
        return recorded

    def close(self) -> None:
        """See `ComponentLibrary.close`."""
        import torch

        self._streams = _Streams(self._device)
        _workspaces.give_back()
        torch.cuda.empty_cache()


def _abandon(graph: torch.cuda.CUDAGraph) -> None:
    """End a capture that has failed; that it cannot end well is no news."""
    try:
        graph.capture_end()
    except RuntimeError:
        return
    graph.reset()
