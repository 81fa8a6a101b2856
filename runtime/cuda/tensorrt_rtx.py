"""TensorRT-RTX engines: loading, the cache of kernels compiled on this machine, and enqueuing."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.bundle import Bundle
from runtime.errors import EngineError
from runtime.files import cache_folder, write_file

from .driver import Driver
from .tensorrt import TENSORRT_RTX, EngineComponent, read_engine, require_same_tensors, require_version

if TYPE_CHECKING:
    from .library import Recording

__all__ = ["TensorRtRtxLibrary", "cache_file"]


def cache_file(bundle: Bundle, device: str) -> Path:
    """Where compiled kernels are kept: beside the bundle, or in the user's cache folder if that is read-only.

    The name holds what they depend on: library, device and the engines themselves. The library checks it again.
    """
    manifest = bundle.manifest
    version = manifest.library.version if manifest.library else "unknown"
    engines = {component.file for component in manifest.components.values()}
    build = min(entry.sha256 for entry in manifest.files if entry.path in engines)
    name = f"{bundle.root.name}.{_slug(device)}-{_slug(version)}-{build[:12]}.rtxcache"
    if os.access(bundle.root.parent, os.W_OK):
        return bundle.root.parent / name
    return cache_folder() / name


class TensorRtRtxLibrary:
    """Implements :class:`~runtime.cuda.library.ComponentLibrary`.

    The activation memory of all engines is the caller's; the engines were built to take it, so that a stream that is
    being captured can run them.
    """

    def __init__(self, bundle: Bundle, driver: Driver, device: str) -> None:
        """``device`` is the name of the GPU. Raises :class:`EngineError` if the library is not the right one."""
        try:
            import tensorrt_rtx as trt
        except ImportError:
            require_version(bundle, TENSORRT_RTX, None)
            raise
        require_version(bundle, TENSORRT_RTX, trt.__version__)
        self._trt = trt
        self._bundle = bundle
        self._driver = driver
        self._logger = trt.Logger(trt.Logger.WARNING)
        self._runtime = trt.Runtime(self._logger)
        self._file = cache_file(bundle, device)
        self._cache: Any = None
        self._components: dict[str, EngineComponent] = {}
        self._stored = b""

    def load(self, name: str) -> EngineComponent:
        """See :meth:`ComponentLibrary.load <runtime.cuda.library.ComponentLibrary.load>`."""
        if name in self._components:
            return self._components[name]
        trt = self._trt
        engine = self._runtime.deserialize_cuda_engine(read_engine(self._bundle, name))
        if engine is None:
            raise EngineError(
                f"component {name!r} does not load in TensorRT-RTX {trt.__version__} on this GPU; the "
                f"library's own message is above. Rebuild the bundle for this GPU"
            )
        self._check(name, engine)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        config.cuda_graph_strategy = (
            trt.CudaGraphStrategy.DISABLED
        )  # whole forwards are recorded, not engines
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            with suppress(OSError):
                self._stored = self._file.read_bytes()
                self._cache.deserialize(self._stored)  # refuses what was compiled elsewhere
        config.set_runtime_cache(self._cache)
        context = engine.create_execution_context(config)
        if context is None:
            raise EngineError(
                f"component {name!r} cannot be prepared on this GPU; TensorRT-RTX's own message is above. "
                f"Free GPU memory, or rebuild the bundle for this GPU"
            )
        self._components[name] = EngineComponent(name, TENSORRT_RTX, engine, context, config)
        return self._components[name]

    def record(self, enqueue: Callable[[], None], stream: int) -> Recording:
        """See :meth:`ComponentLibrary.record <runtime.cuda.library.ComponentLibrary.record>`."""
        self.save()
        return self._driver.capture(enqueue, stream)

    def save(self) -> None:
        """Write the kernels compiled so far, if there are new ones. That they cannot be written is no error."""
        if self._cache is None:
            return
        serialized = self._cache.serialize()
        blob = b"" if serialized is None else bytes(serialized)
        if blob == self._stored or not blob:
            return
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_file(self._file, blob)
            self._stored = blob

    def close(self) -> None:
        """Save the cache and let go of contexts, engines and cache, in this order."""
        self.save()
        self._components.clear()
        self._cache = None

    def _check(self, name: str, engine: Any) -> None:
        """The engine's tensors are those of the manifest."""
        trt, component = self._trt, self._bundle.component(name)
        found = {}
        for index in range(engine.num_io_tensors):
            tensor = engine.get_tensor_name(index)
            kind = "input" if engine.get_tensor_mode(tensor) == trt.TensorIOMode.INPUT else "output"
            shape = list(engine.get_tensor_shape(tensor))
            found[tensor] = f"{kind} {_type_name(trt, engine.get_tensor_dtype(tensor))} {shape}"
        wanted = {
            spec.name: f"{kind} {spec.dtype} {list(spec.shape)}"
            for kind, specs in (("input", component.inputs), ("output", component.outputs))
            for spec in specs
        }
        require_same_tensors(name, found, wanted)


def _type_name(trt: Any, dtype: Any) -> str:
    names = {
        trt.DataType.FLOAT: "float32",
        trt.DataType.HALF: "float16",
        trt.DataType.BF16: "bfloat16",
        trt.DataType.FP8: "float8_e4m3fn",
        trt.DataType.FP4: "float4_e2m1",
        trt.DataType.INT32: "int32",
        trt.DataType.INT64: "int64",
        trt.DataType.UINT8: "uint8",
        trt.DataType.BOOL: "bool",
    }
    return names.get(dtype, str(dtype))


def _slug(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in text)
