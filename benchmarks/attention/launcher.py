"""Runs shipped kernel images on PyTorch tensors, so that what is measured and tested is what products load."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plugins.kernels.specs import KernelError
from runtime.bundle.images import KernelProblem
from runtime.cuda import KernelLauncher, cuda_core
from runtime.errors import EngineError
from runtime.program import KernelLibrary

__all__ = ["ImageLauncher"]


class ImageLauncher:
    """The `plugins.eager.launch.Launcher` over images: PyTorch's memory and streams, `cuda.core`'s launches."""

    def __init__(self, images: Path, device: int = 0, *, warm_up: bool = True) -> None:
        """`images` is the folder that `python -m plugins build` wrote; `warm_up`: load all of them now."""
        torch.zeros(1, device=f"cuda:{device}")  # PyTorch's context, which cuda.core then shares
        self._device = cuda_core().Device(device)
        self._device.set_current()
        major, minor = torch.cuda.get_device_capability(device)
        self.library = KernelLibrary.load(images, (major, minor))
        self._launcher = KernelLauncher(self.library, self._device)
        if warm_up:
            self._launcher.warm_up()
        self._streams: dict[int, Any] = {}

    def names(self, kernel: str, problem: KernelProblem) -> list[str]:
        """The images of `kernel` that serve `problem`, the one that is used first."""
        found = []
        library, images = self.library, list(self.library.index.images)
        while any(image.kernel == kernel for image in images):
            library = replace(library, index=library.index.model_copy(update={"images": tuple(images)}))
            try:
                served = library.serving(kernel, problem)
            except EngineError:
                break
            found.append(served.name)
            images.remove(served)
        return found

    def preferring(self, name: str) -> ImageLauncher:
        """A launcher that takes the image `name` wherever it serves."""
        other = copy(self)
        images = sorted(self.library.index.images, key=lambda image: image.name != name)
        index = self.library.index.model_copy(update={"images": tuple(images)})
        other.library = replace(self.library, index=index)
        other._launcher = KernelLauncher(other.library, self._device)
        return other

    def launch(
        self,
        kernel: str,
        problem: KernelProblem,
        buffers: Mapping[str, Tensor],
        options: Mapping[str, int | float] | None = None,
    ) -> None:
        """Launch on PyTorch's current stream.

        Raises:
            KernelError: a buffer is of another type than the image takes, or not aligned.
        """
        addresses = {name: tensor.data_ptr() for name, tensor in buffers.items()}
        plan = self.library.plan(kernel, problem, addresses, options)
        for argument in plan.image.arguments:
            if argument.source != "buffer":
                continue
            found = str(buffers[argument.name].dtype).removeprefix("torch.")
            if found != argument.element or addresses[argument.name] % 16:
                raise KernelError(
                    f"{plan.image.name} takes {argument.name} as {argument.element} at a multiple of 16 bytes; it is "
                    f"{found} at {addresses[argument.name]:#x}"
                )
        self._launcher.launch(plan, self._stream())

    def _stream(self) -> Any:
        handle = torch.cuda.current_stream().cuda_stream
        if handle not in self._streams:
            self._streams[handle] = (
                self._device.create_stream(_Foreign(handle)) if handle else self._device.default_stream
            )
        return self._streams[handle]


class _Foreign:
    """A stream of another library, as `cuda.core` takes it."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle
