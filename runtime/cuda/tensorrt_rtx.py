"""TensorRT-RTX engines: loading, the cache of kernels compiled on this machine, and enqueuing."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.bundle import MANIFEST_NAME, Bundle
from runtime.files import cache_folder, keep, kept

from .driver import Driver
from .tensorrt import TENSORRT_RTX, EngineLibrary

if TYPE_CHECKING:
    from .library import Recording

__all__ = ["TensorRtRtxLibrary", "cache_file"]


def cache_file(bundle: Bundle, device: str) -> Path:
    """Where compiled kernels are kept: beside the bundle, or in the user's cache folder if that is read-only, or the
    bundle is in a hub cache, whose folders are the hub's own.

    The name holds what they depend on: library, device and the engines themselves. The library checks it again.
    """
    manifest = bundle.manifest
    version = manifest.library.version if manifest.library else "unknown"
    engines = {component.file for component in manifest.components.values()}
    build = min(entry.sha256 for entry in manifest.files if entry.path in engines)
    name = f"{bundle.root.name}.{_slug(device)}-{_slug(version)}-{build[:12]}.rtxcache"
    linked = (bundle.root / MANIFEST_NAME).is_symlink()
    if not linked and os.access(bundle.root.parent, os.W_OK):
        return bundle.root.parent / name
    return cache_folder() / name


class TensorRtRtxLibrary(EngineLibrary):
    """Implements `ComponentLibrary`.

    Engines were built to be given their memory, so that a stream that is being captured can run them.
    """

    def __init__(self, bundle: Bundle, driver: Driver, device: str) -> None:
        """`device` is the name of the GPU.

        Raises:
            EngineError: the library is not the right one.
        """
        try:
            import tensorrt_rtx as trt
        except ImportError:
            trt = None
        super().__init__(bundle, driver, TENSORRT_RTX, trt)
        self._file = cache_file(bundle, device)
        self._cache: Any = None
        self._stored = b""

    def _context(self, engine: Any) -> tuple[Any, Any]:
        trt, config = self._trt, engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        # Whole forwards are recorded, not engines.
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            stored = kept(self._file)
            if stored is not None:
                self._stored = stored
                self._cache.deserialize(stored)  # refuses what was compiled elsewhere
        config.set_runtime_cache(self._cache)
        return engine.create_execution_context(config), config

    def record(self, enqueue: Callable[[], None], stream: int) -> Recording:
        """See `ComponentLibrary.record`."""
        self.save()
        return super().record(enqueue, stream)

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
            keep(self._file, blob)
            self._stored = blob

    def close(self) -> None:
        """Save the cache and let go of contexts, engines and cache, in this order."""
        self.save()
        super().close()
        self._cache = None


def _slug(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in text)
