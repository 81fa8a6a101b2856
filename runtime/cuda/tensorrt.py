"""What TensorRT and TensorRT-RTX have in common: version, file, loading, tensors, enqueuing.

Neither library is imported here: the objects come from the module that did, and both have the methods used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.bundle import Bundle, dtypes_by
from runtime.errors import BundleError, EngineError

from .driver import Driver

if TYPE_CHECKING:
    from .library import Recording

__all__ = [
    "TENSORRT",
    "TENSORRT_RTX",
    "EngineComponent",
    "EngineLibrary",
    "Product",
    "read_engine",
    "require_same_tensors",
    "require_version",
]


@dataclass(frozen=True)
class Product:
    """A library: its name in manifests, the one for people, and the package that installs it."""

    name: str
    title: str
    package: str


TENSORRT = Product("tensorrt", "TensorRT", "tensorrt")
TENSORRT_RTX = Product("tensorrt-rtx", "TensorRT-RTX", "tensorrt-rtx-cu13")


def require_version(bundle: Bundle, product: Product, installed: str | None) -> None:
    """An engine runs with the version of the library that built it and no other.

    `installed` is the version here, or `None`.

    Raises:
        BundleError: the manifest does not say which version that is.
        EngineError: it is not installed.
    """
    library = bundle.manifest.library
    if library is None or library.name != product.name:
        raise BundleError(
            f"bundle {bundle.root} has the backend {product.name!r}, but its manifest names "
            f"{library.name if library else 'no library'}; rebuild the bundle"
        )
    if installed == library.version:
        return
    found = "which is not installed" if installed is None else f"but {installed} is installed"
    raise EngineError(
        f"the engines of bundle {bundle.manifest.name!r} were built by {product.title} {library.version} and run "
        f"with no other version, {found}: run `pip install {product.package}=={library.version}`, or rebuild the "
        f"bundle"
    )


def read_engine(bundle: Bundle, name: str) -> bytes:
    """The engine of component `name`, as its file has it.

    Raises:
        BundleError: it has no file.
        BundleIntegrityError: the file is another one than was verified.
    """
    file = bundle.component(name).file
    if file is None:
        raise BundleError(f"component {name!r} of bundle {bundle.root} has no file; rebuild the bundle")
    with bundle.opened(file) as opened:
        return opened.contents()


def require_same_tensors(component: str, found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Compare an engine's tensors with the manifest's, each described in words.

    Raises:
        BundleError: they differ.
    """
    wrong = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if wrong:
        raise BundleError(
            f"component {component!r}: {len(wrong)} tensor(s) differ between manifest and engine, the first is "
            f"{wrong[0]!r}: {wanted.get(wrong[0], 'absent')} in the manifest, {found.get(wrong[0], 'absent')} in "
            f"the engine; rebuild the bundle"
        )


class EngineComponent:
    """One engine with its context. Addresses are only set where they differ from the last run's."""

    def __init__(self, name: str, product: Product, engine: Any, context: Any, config: Any = None) -> None:
        """`config` is what the context was made with, if anything."""
        self._name = name
        self._product = product
        self._context = context
        self._engine, self._config = engine, config  # both outlive the context
        self._bound: dict[str, int] = {}
        self._scratch = 0

    @property
    def scratch_bytes(self) -> int:
        """See `DeviceComponent`."""
        return int(self._engine.device_memory_size_v2)

    def enqueue(self, addresses: Mapping[str, int], scratch: int, stream: int) -> None:
        """See `DeviceComponent.enqueue`.

        Raises:
            EngineError: the library refuses an address, or fails.
        """
        if scratch != self._scratch:
            self._context.set_device_memory(scratch, self.scratch_bytes)
            self._scratch = scratch
        for tensor, address in addresses.items():
            if self._bound.get(tensor) != address:
                if not self._context.set_tensor_address(tensor, address):
                    raise EngineError(
                        f"component {self._name!r} refuses the address {address:#x} for {tensor!r}"
                    )
                self._bound[tensor] = address
        if not self._context.execute_async_v3(stream):
            raise EngineError(
                f"component {self._name!r} failed; the message of {self._product.title} itself is above. Run `python "
                f"-m runtime verify` on the bundle"
            )


class EngineLibrary(ABC):
    """Implements `ComponentLibrary` but for what a context is made with.

    The activation memory of all engines is the caller's.
    """

    def __init__(self, bundle: Bundle, driver: Driver, product: Product, trt: Any) -> None:
        """`trt` is the library's module, or `None` where it is not installed.

        Raises:
            BundleError: the manifest does not say which version built the engines.
            EngineError: the library is not there in this version.
        """
        require_version(bundle, product, None if trt is None else trt.__version__)
        self._bundle = bundle
        self._driver = driver
        self._product = product
        self._trt = trt
        self._logger = trt.Logger(trt.Logger.WARNING)
        self._runtime = trt.Runtime(self._logger)
        self._components: dict[str, EngineComponent] = {}

    def load(self, name: str) -> EngineComponent:
        """See `ComponentLibrary.load`.

        Raises:
            BundleError: the engine is another one than the manifest says.
            EngineError: it does not load, or cannot be prepared.
        """
        if name in self._components:
            return self._components[name]
        title = self._product.title
        engine = self._runtime.deserialize_cuda_engine(read_engine(self._bundle, name))
        if engine is None:
            raise EngineError(
                f"component {name!r} does not load in {title} {self._trt.__version__} on this GPU; the "
                f"library's own message is above. Rebuild the bundle for this GPU"
            )
        self._check(name, engine)
        context, config = self._context(engine)
        if context is None:
            raise EngineError(
                f"component {name!r} cannot be prepared on this GPU; {title}'s own message is above. Free "
                f"GPU memory, or rebuild the bundle for this GPU"
            )
        self._components[name] = EngineComponent(name, self._product, engine, context, config)
        return self._components[name]

    @abstractmethod
    def _context(self, engine: Any) -> tuple[Any, Any]:
        """An execution context that is given its memory, or `None`, and what it was made with, if anything."""

    def record(self, enqueue: Callable[[], None], stream: int) -> Recording:
        """See `ComponentLibrary.record`."""
        return self._driver.capture(enqueue, stream)

    def close(self) -> None:
        """Let go of contexts and engines."""
        self._components.clear()

    def _check(self, name: str, engine: Any) -> None:
        """Hold the engine's tensors against the manifest's."""
        component, inputs = self._bundle.component(name), self._trt.TensorIOMode.INPUT
        types = {getattr(self._trt.DataType, ours): dtype for ours, dtype in dtypes_by("tensorrt").items()}
        found = {}
        for index in range(engine.num_io_tensors):
            tensor = engine.get_tensor_name(index)
            kind = "input" if engine.get_tensor_mode(tensor) == inputs else "output"
            dtype = engine.get_tensor_dtype(tensor)
            found[tensor] = f"{kind} {types.get(dtype, dtype)} {list(engine.get_tensor_shape(tensor))}"
        wanted = {
            spec.name: f"{kind} {spec.dtype} {list(spec.shape)}"
            for kind, specs in (("input", component.inputs), ("output", component.outputs))
            for spec in specs
        }
        require_same_tensors(name, found, wanted)
