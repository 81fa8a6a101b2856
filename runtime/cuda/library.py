"""What a library that runs engines on a GPU offers the CUDA executor.

The executor owns memory, streams and order; a library only enqueues a component on addresses that it is given. There
is one `ComponentLibrary` per loaded bundle, and a thread calls it only with the device's primary context
current.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

__all__ = ["ComponentLibrary", "DeviceComponent", "Recording"]


class DeviceComponent(Protocol):
    """One engine, loaded. Its runs may differ in addresses, never in shapes."""

    @property
    def scratch_bytes(self) -> int:
        """Activation memory that every run needs and the caller provides; 0 if the library has its own."""

    def enqueue(self, addresses: Mapping[str, int], scratch: int, stream: int) -> None:
        """Enqueue one run: nothing is allocated or synchronised, so that a CUDA graph can capture it.

        Args:
            addresses: device address of every input and output by name; each a multiple of 256.
            scratch: address of `scratch_bytes` bytes, a multiple of 256.
            stream: the `CUstream` handle.

        Raises:
            EngineError: the library refuses.
        """


class Recording(Protocol):
    """Work recorded once, to be replayed."""

    def launch(self, stream: int) -> None:
        """Enqueue the work on `stream`."""

    def close(self) -> None:
        """Free it; no replay may be running."""


class ComponentLibrary(Protocol):
    """The engines of one bundle."""

    def load(self, name: str) -> DeviceComponent:
        """Load a component of the bundle.

        Raises:
            EngineError: it does not load here, such as with another version of the library.
        """

    def record(self, enqueue: Callable[[], None], stream: int) -> Recording:
        """Record what `enqueue` puts on `stream`, in thread-local capture mode.

        Every component in it has run at least once before.
        """

    def close(self) -> None:
        """Unload everything, and save what makes the next start faster."""
