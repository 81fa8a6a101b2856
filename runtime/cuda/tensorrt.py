"""What engines of TensorRT and of TensorRT-RTX have in common: version, file, tensors, enqueuing.

Neither library is imported here: the objects come from the module that did, and both have the methods used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.bundle import Bundle
from runtime.errors import BundleError, EngineError

__all__ = [
    "TENSORRT",
    "TENSORRT_RTX",
    "EngineComponent",
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

    ``installed`` is the version here, or ``None``.

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
    """The engine of component ``name``, as its file has it.

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
    """Compare an engine's tensors with the manifest's, each described in words. Raises :class:`BundleError`."""
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
        """``config`` is what the context was made with, if anything."""
        self._name = name
        self._product = product
        self._context = context
        self._engine, self._config = engine, config  # both outlive the context
        self._bound: dict[str, int] = {}
        self._scratch = 0

    @property
    def scratch_bytes(self) -> int:
        """See :class:`~runtime.cuda.library.DeviceComponent`."""
        return int(self._engine.device_memory_size_v2)

    def enqueue(self, addresses: Mapping[str, int], scratch: int, stream: int) -> None:
        """See :meth:`DeviceComponent.enqueue <runtime.cuda.library.DeviceComponent.enqueue>`."""
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
