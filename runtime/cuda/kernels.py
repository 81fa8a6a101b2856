"""Launching kernel images through `cuda.core`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from runtime.bundle.images import Image
from runtime.errors import EngineError
from runtime.program.kernels import KernelLibrary, LaunchPlan

__all__ = ["KernelLauncher", "cuda_core"]


class KernelLauncher:
    """Launches images of a library on one device. One instance per device; safe to use during stream capture once
    every image has been loaded (`warm_up`).
    """

    def __init__(self, library: KernelLibrary, device: Any) -> None:
        """`device` is a `cuda.core.Device`, current in this thread."""
        self._library = library
        self._device = device
        self._core = cuda_core()
        self._kernels: dict[str, Any] = {}

    @property
    def library(self) -> KernelLibrary:
        """The images."""
        return self._library

    def warm_up(self, images: Sequence[Image] | None = None) -> None:
        """Load images (default: all) onto the device."""
        for image in self._library.index.images if images is None else images:
            self._kernel(image)

    def launch(self, plan: LaunchPlan, stream: Any) -> None:
        """Enqueue `plan` on `stream` (a `cuda.core.Stream`). Nothing is synchronised or allocated.

        Raises:
            EngineError: the image does not load, or the driver refuses the launch.
        """
        kernel = self._kernel(plan.image)
        config = self._core.LaunchConfig(
            grid=plan.grid, block=(plan.image.threads, 1, 1), shmem_size=plan.image.shared_memory
        )
        try:
            self._core.launch(stream, config, kernel, *plan.values)
        except Exception as error:  # the library's own errors, none of which is public
            raise EngineError(
                f"kernel image {plan.image.name} cannot be launched on CUDA device {self._device.device_id}: {error}. "
                f"An error of an earlier launch may show here; CUDA_LAUNCH_BLOCKING=1 tells which"
            ) from error

    def _kernel(self, image: Image) -> Any:
        kernel = self._kernels.get(image.name)
        if kernel is None:
            try:
                kernel = self._core.ObjectCode.from_cubin(self._library.cubins[image.name]).get_kernel(
                    image.entry
                )
            except Exception as error:  # as above
                raise EngineError(
                    f"kernel image {image.name} for {self._library.index.target} does not load on CUDA device "
                    f"{self._device.device_id}: {error}. It needs a driver of branch "
                    f"{self._library.index.driver} or newer: update the driver, or rebuild the kernels for this GPU"
                ) from error
            if image.shared_memory > _DEFAULT_SHARED_MEMORY:
                _allow_shared_memory(kernel, image.shared_memory, self._device.device_id)
            self._kernels[image.name] = kernel
        return kernel


_DEFAULT_SHARED_MEMORY = 48 * 1024


def cuda_core() -> Any:
    """The module that holds `cuda.core`'s API.

    Raises:
        EngineError: it is not installed.
    """
    try:
        core = import_module("cuda.core")
        # Before its release 1.0 the API lived in a module of its own.
        return core if hasattr(core, "launch") else import_module("cuda.core.experimental")
    except ImportError as error:
        raise EngineError(
            "launching kernels needs the packages cuda-core and cuda-bindings; install the `gpu` extra"
        ) from error


def _allow_shared_memory(kernel: Any, size: int, device_id: int) -> None:
    """More than 48 KiB of dynamic shared memory must be asked for, per kernel and device."""
    from cuda.bindings import driver

    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    handle = getattr(kernel, "handle", None) or kernel._handle
    (status,) = driver.cuKernelSetAttribute(attribute, size, handle, device_id)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise EngineError(
            f"device {device_id} does not give a kernel {size} bytes of shared memory: {status!r}"
        )
