"""TensorRT engines with this project's operators as plugins inside: loading, and enqueuing."""

from __future__ import annotations

import threading
from typing import Any, Final

from runtime.bundle import Bundle
from runtime.errors import BundleError, EngineError

from .driver import Driver
from .tensorrt import TENSORRT, EngineLibrary

__all__ = ["PLUGIN_FILE", "TensorRtLibrary", "plugin_entry"]

PLUGIN_FILE: Final = "libnvinfer_plugin_lightforcing.so"
"""The plugin library, as a bundle holds it."""

_OPERATORS = ("HierarchicalSparseAttention", "QKPrepare")
_PLUGIN_VERSION, _PLUGIN_NAMESPACE = "1", "lightforcing"

_registered: dict[str, Any] = {}
"""Plugin libraries that this process registered, by hash. There is one registry for all bundles."""
_registering = threading.Lock()


def plugin_entry(bundle: Bundle) -> str:
    """SHA-256 of the bundle's plugin library.

    Raises:
        BundleError: the bundle has none.
    """
    wanted = next((entry.sha256 for entry in bundle.manifest.files if entry.path == PLUGIN_FILE), None)
    if wanted is None:
        raise BundleError(f"bundle {bundle.root} has no {PLUGIN_FILE}, which its engines need; rebuild it")
    return wanted


def _register_plugins(bundle: Bundle, registry: Any) -> None:
    """Register the bundle's plugins with TensorRT, once per process; before any engine is read.

    Raises:
        EngineError: the library does not load, or plugins of another bundle's library are registered.
        BundleIntegrityError: it is another one than the manifest lists.
    """
    digest = plugin_entry(bundle)
    with _registering, bundle.opened(PLUGIN_FILE) as file:
        if digest in _registered:
            return
        if _registered:
            raise EngineError(
                f"bundle {bundle.manifest.name!r} has a plugin library of another build than the bundle that this "
                f"process loaded before, and TensorRT keeps one; load it in a process of its own"
            )
        handle = registry.load_library(str(file.path))
        file.check_name()
        lacking = [
            name
            for name in _OPERATORS
            if registry.get_creator(name, _PLUGIN_VERSION, _PLUGIN_NAMESPACE) is None
        ]
        if handle is None or lacking:
            raise EngineError(
                f"{file.path} registers no plugin {', '.join(lacking or _OPERATORS)} with TensorRT; rebuild the bundle"
            )
        _registered[digest] = handle


class TensorRtLibrary(EngineLibrary):
    """Implements `ComponentLibrary`.

    The plugins stay when it is closed: TensorRT has one registry for the process.
    """

    def __init__(self, bundle: Bundle, driver: Driver) -> None:
        """Register the bundle's plugins.

        Raises:
            EngineError: TensorRT is not there in the right version, or without its plugins.
        """
        try:
            import tensorrt as trt
        except ImportError:
            trt = None
        super().__init__(bundle, driver, TENSORRT, trt)
        _register_plugins(bundle, trt.get_plugin_registry())

    def _context(self, engine: Any) -> tuple[Any, Any]:
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return engine.create_execution_context(strategy), None
