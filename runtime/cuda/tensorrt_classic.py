"""TensorRT engines with this project's operators as plugins inside: loading, and enqueuing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from runtime.bundle import Bundle
from runtime.errors import BundleError, EngineError

from .driver import Driver
from .tensorrt import TENSORRT, EngineComponent, read_engine, require_same_tensors, require_version

if TYPE_CHECKING:
    from .library import Recording

__all__ = ["PLUGIN_FILE", "TensorRtLibrary", "plugin_entry"]

PLUGIN_FILE: Final = "libnvinfer_plugin_lightforcing.so"
"""The plugin library, as a bundle holds it."""

_OPERATORS = ("HierarchicalSparseAttention", "QKPrepare")
_PLUGIN_VERSION, _PLUGIN_NAMESPACE = "1", "lightforcing"

_registered: dict[str, Any] = {}
"""Plugin libraries that this process registered, by hash. There is one registry for all bundles."""
_registering = threading.Lock()


def plugin_entry(bundle: Bundle) -> str:
    """SHA-256 of the bundle's plugin library. Raises :class:`BundleError` if the bundle has none."""
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


class TensorRtLibrary:
    """Implements :class:`~runtime.cuda.library.ComponentLibrary`.

    The activation memory of all engines is the caller's.
    """

    def __init__(self, bundle: Bundle, driver: Driver) -> None:
        """Raises :class:`EngineError` if TensorRT is not there in the right version, or without its plugins."""
        try:
            import tensorrt as trt
        except ImportError:
            require_version(bundle, TENSORRT, None)
            raise
        require_version(bundle, TENSORRT, trt.__version__)
        self._trt = trt
        self._bundle = bundle
        self._driver = driver
        self._logger = trt.Logger(trt.Logger.WARNING)
        registry = trt.get_plugin_registry()
        _register_plugins(bundle, registry)
        self._runtime = trt.Runtime(self._logger)
        self._components: dict[str, EngineComponent] = {}

    def load(self, name: str) -> EngineComponent:
        """See :meth:`ComponentLibrary.load <runtime.cuda.library.ComponentLibrary.load>`."""
        if name in self._components:
            return self._components[name]
        trt = self._trt
        engine = self._runtime.deserialize_cuda_engine(read_engine(self._bundle, name))
        if engine is None:
            raise EngineError(
                f"component {name!r} does not load in TensorRT {trt.__version__} on this GPU; the library's "
                f"own message is above. Rebuild the bundle on this GPU"
            )
        self._check(name, engine)
        context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise EngineError(
                f"component {name!r} cannot be prepared on this GPU; TensorRT's own message is above. Free "
                f"GPU memory, or rebuild the bundle on this GPU"
            )
        self._components[name] = EngineComponent(name, TENSORRT, engine, context)
        return self._components[name]

    def record(self, enqueue: Callable[[], None], stream: int) -> Recording:
        """See :meth:`ComponentLibrary.record <runtime.cuda.library.ComponentLibrary.record>`."""
        return self._driver.capture(enqueue, stream)

    def close(self) -> None:
        """Let go of contexts and engines. The plugins stay: TensorRT has one registry for the process."""
        self._components.clear()

    def _check(self, name: str, engine: Any) -> None:
        """The engine's tensors are those of the manifest."""
        trt, component = self._trt, self._bundle.component(name)
        kinds = {trt.TensorIOMode.INPUT: "input", trt.TensorIOMode.OUTPUT: "output"}
        found = {}
        for index in range(engine.num_io_tensors):
            tensor = engine.get_tensor_name(index)
            shape = [int(dim) for dim in engine.get_tensor_shape(tensor)]
            found[tensor] = f"{kinds[engine.get_tensor_mode(tensor)]} {shape}"
        wanted = {
            spec.name: f"{kind} {list(spec.shape)}"
            for kind, specs in (("input", component.inputs), ("output", component.outputs))
            for spec in specs
        }
        require_same_tensors(name, found, wanted)
