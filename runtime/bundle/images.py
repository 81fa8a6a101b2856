"""The kernel-image format: a folder of cubins per architecture and one JSON index that says how to launch them.

Everything a launcher must know is in the index, so a loader needs no compiler, and a kernel from any other source
(CUDA C++ through nvcc or NVRTC) replaces one of ours by taking its place in the index. docs/kernels.md explains the
fields and lists the vocabulary of buffers, options and sizes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, ValidationError, model_validator

from runtime.errors import BundleIntegrityError, BundleSchemaError
from runtime.files import write_file

from .fields import NonNegative, Part, Positive, Sha256

__all__ = [
    "FORMAT_VERSION",
    "INDEX_NAME",
    "Argument",
    "GridAxis",
    "Image",
    "ImageSet",
    "KernelProblem",
    "read_cubin",
    "read_images",
    "read_index",
    "write_images",
]

FORMAT_VERSION: Final = 2
INDEX_NAME: Final = "kernels.json"

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


@dataclass(frozen=True)
class KernelProblem:
    """Sizes of one call.

    `past_frames` is the length of `frame_slots`: the largest number of past frames, not the number present.
    `ordered_blocks` has the query and the key blocks of a frame where tables name their tokens; None: blocks are runs
    of consecutive tokens. `groups` are blocks in time and space among which queries choose, all that there can be.
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
    ordered_blocks: tuple[int, int] | None = None
    groups: int = 0

    def sizes(self) -> dict[str, int]:
        """The integers that grids and integer arguments are made of, and that choose an image."""
        q_blocks, k_blocks = self.ordered_blocks or (
            -(-self.frame_tokens // self.block_q),
            -(-self.frame_tokens // self.block_k),
        )
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
            "groups": self.groups,
        }


class Argument(Part):
    """One kernel argument, in launch order.

    `source` says who supplies the value: a `buffer` (device address) or `option` (operator attribute) of the caller,
    a `size` of the problem, or `null`: a pointer that is always zero (Triton's two trailing scratch pointers).
    """

    name: Name
    type: Literal["pointer", "int32", "float32"]
    element: Literal["bfloat16", "float16", "float32", "int32", "int16", "uint8"] | None = None
    source: Literal["buffer", "option", "size", "null"]

    @model_validator(mode="after")
    def _pointers_have_elements(self) -> Argument:
        if (self.element is not None) != (self.source == "buffer"):
            raise ValueError(f"argument {self.name!r}: `element` belongs to buffers, and only to them")
        if (self.type == "pointer") != (self.source in ("buffer", "null")):
            raise ValueError(
                f"argument {self.name!r}: type {self.type!r} does not go with source {self.source!r}"
            )
        return self


class GridAxis(Part):
    """`ceil(size / tile)` thread blocks."""

    size: Name
    tile: Positive


class Image(Part):
    """One compiled kernel specialisation.

    It serves a problem if each size (or `dtype`) named in `serves` has one of the listed values and none exceeds its
    entry in `limits`. Among several that do, the first in the index is used.
    """

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

    @model_validator(mode="after")
    def _unique_arguments(self) -> Image:
        names = [argument.name for argument in self.arguments]
        if len(set(names)) != len(names):
            raise ValueError(f"image {self.name!r} has two arguments of one name: {names}")
        return self


class ImageSet(Part):
    """The index of one folder.

    `arch` is the compute capability the images run on (`sm_90`), `target` what they were compiled for (`sm_90a`). A
    target with a letter runs on exactly that capability, one without also on later minor revisions. `driver` is the
    branch of the oldest driver that loads them (`525`).
    """

    format_version: Literal[2] = 2
    arch: Annotated[str, Field(pattern=r"^sm_\d+$")]
    target: Annotated[str, Field(pattern=r"^sm_\d+[af]?$")]
    driver: Positive
    compiler: dict[str, str]
    images: tuple[Image, ...]

    @model_validator(mode="after")
    def _consistent(self) -> ImageSet:
        names = [image.name for image in self.images]
        if len(set(names)) != len(names):
            raise ValueError("two images have the same name")
        if self.target.rstrip("af") != self.arch:
            raise ValueError(f"target {self.target!r} is not one of {self.arch!r}")
        return self

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability, e.g. `(9, 0)`."""
        number = int(self.arch.removeprefix("sm_"))
        return number // 10, number % 10

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether the images run on a device of compute capability `capability`."""
        if self.target != self.arch:
            return capability == self.capability
        return capability[0] == self.capability[0] and capability >= self.capability


def read_index(folder: Path) -> ImageSet:
    """Read the index of a folder of images.

    Raises:
        BundleIntegrityError: there is none.
        BundleSchemaError: it is of another format.
    """
    path = folder / INDEX_NAME
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BundleIntegrityError(
            f"{path} does not exist; build it with `python -m plugins build`"
        ) from error
    return parse_index(content, path)


def parse_index(content: bytes, path: Path) -> ImageSet:
    """The index that was read from `path`.

    Raises:
        BundleSchemaError: it is of another format.
    """
    try:
        return ImageSet.model_validate_json(content, strict=True)
    except ValidationError as error:
        raise BundleSchemaError(
            f"{path} is not an index of kernel images of format {FORMAT_VERSION}; rebuild the kernels: {error}"
        ) from error


def read_cubin(folder: Path, image: Image) -> bytes:
    """The verified cubin of an image of the folder.

    Raises:
        BundleIntegrityError: it is missing, or differs from its hash or size.
    """
    path = folder / image.file
    try:
        cubin = path.read_bytes()
    except OSError as error:
        raise BundleIntegrityError(f"kernel image {path} is missing; rebuild the kernels") from error
    return check_cubin(cubin, image, path)


def check_cubin(cubin: bytes, image: Image, path: Path) -> bytes:
    """The cubin, which was read from `path`, if it is that of `image`.

    Raises:
        BundleIntegrityError: it is not the file that the index lists.
    """
    digest = hashlib.sha256(cubin).hexdigest()
    if digest != image.sha256 or len(cubin) != image.bytes:
        raise BundleIntegrityError(
            f"kernel image {path} has SHA-256 {digest} and {len(cubin)} bytes, its index says {image.sha256} and "
            f"{image.bytes}; rebuild the kernels"
        )
    return cubin


def read_images(folder: Path) -> tuple[ImageSet, dict[str, bytes]]:
    """Read and verify a folder of images.

    Returns:
        The index, and the cubins by image name.

    Raises:
        BundleIntegrityError, BundleSchemaError: as `read_index` and `read_cubin`.
    """
    index = read_index(folder)
    return index, {image.name: read_cubin(folder, image) for image in index.images}


def write_images(folder: Path, images: ImageSet, cubins: Mapping[str, bytes]) -> None:
    """Write a folder of images so that a reader finds the old set or the new one, never a mixture.

    Cubin files are named by their content and the index is replaced last, in one step. Cubins that the new index
    does not name are deleted then; writers of one folder must take turns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for image in images.images:
        if not (folder / image.file).exists():
            write_file(folder / image.file, cubins[image.name])
    write_file(folder / INDEX_NAME, images.model_dump_json(indent=1) + "\n")
    named = {image.file for image in images.images}
    for stale in folder.glob("*.cubin"):
        if stale.name not in named:
            stale.unlink()
