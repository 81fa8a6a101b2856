"""Kernel images: which one serves a problem, and with what launch.

Reads the folders that `python -m plugins build` writes (docs/kernels.md describes the format). Needs neither a
compiler, nor PyTorch, nor a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime.bundle import Bundle
from runtime.bundle.images import (
    INDEX_NAME,
    Argument,
    GridAxis,
    Image,
    ImageSet,
    KernelProblem,
    check_cubin,
    parse_index,
    read_cubin,
    read_index,
)
from runtime.errors import EngineError

__all__ = ["KernelLibrary", "KernelProblem", "LaunchPlan"]


Value = np.uint64 | np.int32 | np.float32


@dataclass(frozen=True)
class LaunchPlan:
    """One launch, ready to be repeated: argument values in order, typed as the kernel takes them."""

    image: Image
    grid: tuple[int, int, int]
    values: tuple[Value, ...]


@dataclass(frozen=True)
class KernelLibrary:
    """A verified set of images, with their cubins by image name."""

    index: ImageSet
    cubins: Mapping[str, bytes]

    @classmethod
    def load(cls, root: Path, capability: tuple[int, int]) -> KernelLibrary:
        """Read the images under `root` (folders `sm_XX`) that suit a device of `capability`.

        Raises:
            EngineError: no folder suits the device.
            BundleSchemaError: the index is malformed.
            BundleIntegrityError: a cubin is missing or differs from its recorded hash.
        """
        offered = [(path.parent, read_index(path.parent)) for path in sorted(root.glob(f"sm_*/{INDEX_NAME}"))]
        suitable = [(index.capability, path, index) for path, index in offered if index.runs_on(capability)]
        if not suitable:
            found = ", ".join(index.target for _, index in offered) or "none"
            raise EngineError(
                f"{root} holds kernels for {found}; this device has compute capability "
                f"{capability[0]}.{capability[1]}. Build them with `python -m plugins build --arch sm_...`"
            )
        _, path, index = max(suitable, key=lambda item: item[0])
        return cls(index, {image.name: read_cubin(path, image) for image in index.images})

    @classmethod
    def of(cls, bundle: Bundle, capability: tuple[int, int]) -> KernelLibrary:
        """The images of a bundle, of which nothing is read that its manifest does not list.

        Raises:
            EngineError: the bundle has none for a device of `capability`.
            BundleSchemaError: the index is malformed.
            BundleIntegrityError: a file is missing, changed or not listed.
        """
        kernels = bundle.manifest.kernels
        if kernels is None:
            raise EngineError(f"bundle {bundle.root} holds no kernel images; rebuild it")
        folder = f"{kernels.folder}/{kernels.arch}"
        path = f"{folder}/{INDEX_NAME}"
        with bundle.opened(path) as file:
            index = parse_index(file.contents(), file.path)
        if not index.runs_on(capability):
            raise EngineError(
                f"{bundle.root} holds kernels for {index.target}; this device has compute capability "
                f"{capability[0]}.{capability[1]}. Build a bundle for this GPU"
            )
        cubins = {}
        for image in index.images:
            with bundle.opened(f"{folder}/{image.file}") as file:
                cubins[image.name] = check_cubin(file.contents(), image, file.path)
        return cls(index, cubins)

    def serving(self, kernel: str, problem: KernelProblem) -> Image:
        """The first image of `kernel` that serves `problem`.

        Raises:
            EngineError: none does.
        """
        sizes = problem.sizes()
        facts: dict[str, int | str | None] = {**sizes, "dtype": problem.dtype}
        offered = [image for image in self.index.images if image.kernel == kernel]
        for image in offered:
            fits = all(facts.get(key) in values for key, values in image.serves.items())
            if fits and all(sizes.get(key, limit + 1) <= limit for key, limit in image.limits.items()):
                return image
        raise EngineError(
            f"no {kernel!r} kernel for {self.index.arch} serves {problem}; {_served(offered)}. Build the missing "
            "specialisation or change the block sizes"
        )

    def plan(
        self,
        kernel: str,
        problem: KernelProblem,
        buffers: Mapping[str, int],
        options: Mapping[str, int | float] | None = None,
    ) -> LaunchPlan:
        """Choose the image and lay out grid and arguments.

        Args:
            buffers: device address of each buffer, by name.
            options: scalar arguments that are not sizes, by name.

        Raises:
            EngineError: no image serves the problem, or an argument is missing.
        """
        image = self.serving(kernel, problem)
        sizes = problem.sizes()
        sources: dict[str, Mapping[str, int | float]] = {
            "buffer": buffers,
            "option": options or {},
            "size": sizes,
            "null": {argument.name: 0 for argument in image.arguments},
        }
        missing = [a.name for a in image.arguments if a.name not in sources[a.source]]
        unknown = [a.size for a in image.grid if isinstance(a, GridAxis) and a.size not in sizes]
        if missing or unknown:
            raise EngineError(
                f"image {image.name} needs argument(s) {missing} and size(s) {unknown} that the caller does not "
                f"supply; it was given buffers {sorted(buffers)} and options {sorted(options or {})}"
            )
        return LaunchPlan(
            image,
            _grid(image.grid, sizes),
            tuple(_typed(argument, sources[argument.source][argument.name]) for argument in image.arguments),
        )


def _served(images: Sequence[Image]) -> str:
    """What a kernel's images serve between them, for messages."""
    if not images:
        return "there are no images of this kernel"
    values = [
        f"{key} {', '.join(sorted({str(v) for image in images for v in image.serves.get(key, ())}))}"
        for key in dict.fromkeys(key for image in images for key in image.serves)
    ]
    limits = [
        f"{key} up to {max(image.limits.get(key, 0) for image in images)}"
        for key in dict.fromkeys(key for image in images for key in image.limits)
    ]
    return "its images serve (not in every combination) " + "; ".join(values + limits)


def _grid(axes: tuple[GridAxis | int, ...], sizes: Mapping[str, int]) -> tuple[int, int, int]:
    x, y, z = (axis if isinstance(axis, int) else -(-sizes[axis.size] // axis.tile) for axis in axes)
    return x, y, z


def _typed(argument: Argument, value: int | float) -> Value:
    if argument.type == "pointer":
        return np.uint64(value)
    return np.int32(value) if argument.type == "int32" else np.float32(value)
