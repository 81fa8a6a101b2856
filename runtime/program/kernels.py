"""Kernel images: which one serves a problem, with what launch, and launching it through ``cuda.core``.

Reads the folders that ``python -m plugins build`` writes (docs/kernels.md describes the format). Needs neither a
compiler nor PyTorch; choosing and planning need no GPU either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime.errors import BundleIntegrityError, BundleSchemaError, EngineError

__all__ = [
    "INDEX_NAME",
    "Argument",
    "GridAxis",
    "Image",
    "ImageSet",
    "KernelLauncher",
    "KernelLibrary",
    "KernelProblem",
    "LaunchPlan",
    "cuda_core",
]

INDEX_NAME: Final = "kernels.json"

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Argument(_Part):
    """One kernel argument; ``source`` says who supplies its value (``null``: a pointer that is always zero)."""

    name: Name
    type: Literal["pointer", "int32", "float32"]
    element: Literal["bfloat16", "float16", "float32", "int32", "int16"] | None = None
    source: Literal["buffer", "option", "size", "null"]


class GridAxis(_Part):
    """``ceil(size / tile)`` thread blocks."""

    size: Name
    tile: Positive


class Image(_Part):
    """One compiled kernel specialisation, the problems it serves, and how to launch it."""

    name: FileName
    kernel: Name
    file: FileName
    sha256: Sha256
    bytes: Positive
    entry: str
    threads: Annotated[int, Field(gt=0, le=1024, multiple_of=32)]
    shared_memory: NonNegative
    grid: tuple[GridAxis | Positive, GridAxis | Positive, GridAxis | Positive]
    arguments: Annotated[tuple[Argument, ...], Field(min_length=1)]
    serves: dict[Name, tuple[int | str, ...]]
    limits: dict[Name, Positive]
    registers: Positive
    stack: NonNegative
    spill_stores: NonNegative
    spill_loads: NonNegative
    source_sha256: Sha256


class ImageSet(_Part):
    """The index of one folder. A ``target`` with a letter runs on exactly its compute capability."""

    format_version: Literal[1] = 1
    arch: Annotated[str, Field(pattern=r"^sm_\d+$")]
    target: Annotated[str, Field(pattern=r"^sm_\d+[af]?$")]
    compiler: dict[str, str]
    images: tuple[Image, ...]

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability, e.g. ``(9, 0)``."""
        number = int(self.arch.removeprefix("sm_"))
        return number // 10, number % 10

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether the images run on a device of compute capability ``capability``."""
        if self.target != self.arch:
            return capability == self.capability
        return capability[0] == self.capability[0] and capability >= self.capability


@dataclass(frozen=True)
class KernelProblem:
    """Sizes of one call.

    ``past_frames`` is the length of ``frame_slots``: the largest number of past frames, not the number present.
    """

    dtype: str
    heads: int
    head_dim: int
    frame_tokens: int
    chunk_frames: int
    past_frames: int
    block_q: int
    block_k: int
    sinks: int = 0

    def sizes(self) -> dict[str, int]:
        """The integers that grids and integer arguments are made of."""
        q_blocks = -(-self.frame_tokens // self.block_q)
        k_blocks = -(-self.frame_tokens // self.block_k)
        frames = self.past_frames + self.chunk_frames
        return {
            "heads": self.heads,
            "head_dim": self.head_dim,
            "frame_tokens": self.frame_tokens,
            "chunk_frames": self.chunk_frames,
            "past_frames": self.past_frames,
            "frames": frames,
            "block_q": self.block_q,
            "block_k": self.block_k,
            "q_blocks": q_blocks,
            "k_blocks": k_blocks,
            "query_blocks": self.chunk_frames * q_blocks,
            "key_blocks": frames * k_blocks,
            "row_blocks": self.chunk_frames * max(q_blocks, k_blocks),
            "frame_elements": self.frame_tokens * self.heads * self.head_dim,
            "even": int(self.frame_tokens % self.block_q == 0 and self.frame_tokens % self.block_k == 0),
            "sinks": self.sinks,
        }


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
        """Read the images under ``root`` (folders ``sm_XX``) that suit a device of ``capability``.

        Raises:
            EngineError: no folder suits the device.
            BundleSchemaError: the index is malformed.
            BundleIntegrityError: a cubin is missing or differs from its recorded hash.
        """
        offered = [_read_index(path) for path in sorted(root.glob(f"sm_*/{INDEX_NAME}"))]
        suitable = [(index.capability, path, index) for path, index in offered if index.runs_on(capability)]
        if not suitable:
            found = ", ".join(index.target for _, index in offered) or "none"
            raise EngineError(
                f"{root} holds kernels for {found}; this device has compute capability "
                f"{capability[0]}.{capability[1]}. Build them with `python -m plugins build --arch sm_...`"
            )
        _, path, index = max(suitable, key=lambda item: item[0])
        return cls(index, {image.name: _read_cubin(path.parent, image) for image in index.images})

    def serving(self, kernel: str, problem: KernelProblem) -> Image:
        """The first image of ``kernel`` that serves ``problem``.

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


class KernelLauncher:
    """Launches images of a library on one device. One instance per device; safe to use during stream capture once
    every image has been loaded (``warm_up``)."""

    def __init__(self, library: KernelLibrary, device: Any) -> None:
        """``device`` is a ``cuda.core.Device``, current in this thread."""
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
        """Enqueue ``plan`` on ``stream`` (a ``cuda.core.Stream``). Nothing is synchronised or allocated.

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
                    f"{self._device.device_id}: {error}; rebuild the kernels for this GPU"
                ) from error
            if image.shared_memory > _DEFAULT_SHARED_MEMORY:
                _allow_shared_memory(kernel, image.shared_memory, self._device.device_id)
            self._kernels[image.name] = kernel
        return kernel


_DEFAULT_SHARED_MEMORY = 48 * 1024


def cuda_core() -> Any:
    """The module that holds ``cuda.core``'s API. Raises :class:`EngineError` if it is not installed."""
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


def _read_index(path: Path) -> tuple[Path, ImageSet]:
    try:
        return path, ImageSet.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise BundleSchemaError(
            f"{path} is not an index of kernel images that this runtime reads; rebuild the kernels: {error}"
        ) from error


def _read_cubin(folder: Path, image: Image) -> bytes:
    path = folder / image.file
    try:
        cubin = path.read_bytes()
    except OSError as error:
        raise BundleIntegrityError(f"kernel image {path} cannot be read; rebuild the kernels") from error
    digest = hashlib.sha256(cubin).hexdigest()
    if digest != image.sha256:
        raise BundleIntegrityError(
            f"kernel image {path} has SHA-256 {digest}, its index says {image.sha256}; rebuild the kernels"
        )
    return cubin
