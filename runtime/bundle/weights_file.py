"""Reading safetensors files of every type a bundle uses, tensor by tensor.

The library's own numpy reader knows no float8. A file is an 8-byte little-endian length, a JSON header of that length
(tensor name to type, shape and byte range), and the tensors.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Final, Self, TypeGuard

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BundleError

from .dtypes import Dtype, dtypes_by, nbytes, numpy_dtype
from .files import BundleFile, OpenFile
from .strict_json import parse_json

__all__ = ["StoredTensor", "WeightsFile", "is_finite"]

_LENGTH_BYTES = 8
_MAX_HEADER = 100 << 20
"""Larger headers are refused, as by the safetensors library."""
_MOST = 1 << 48
"""No size, no offset and no product of sizes is larger: numpy refuses such, even beside a size of 0."""

_STORED: Final = dtypes_by("safetensors")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `offset` in bytes from the start of the file."""

    dtype: Dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def _stored(name: str, entry: Any) -> StoredTensor:
    """A tensor as a header describes it; `ValueError` if it does not."""
    fields = entry if isinstance(entry, dict) else {}
    kind, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has the shape {shape!r} and the bytes {offsets!r}")
    if not isinstance(kind, str) or kind not in _STORED:
        raise ValueError(f"tensor {name!r} has the type {kind!r}, expected {', '.join(_STORED)}")
    begin, end = offsets
    if math.prod(size or 1 for size in shape) >= _MOST:
        raise ValueError(f"tensor {name!r} has the shape {shape!r}")
    if end - begin != nbytes(_STORED[kind], shape):
        raise ValueError(f"tensor {name!r} of shape {shape} claims the bytes {begin} to {end}")
    return StoredTensor(_STORED[kind], tuple(shape), begin, end - begin)


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < _MOST for value in values)


class WeightsFile(Mapping[str, NDArray[Any]]):
    """The tensors of a safetensors file by name, each read when it is asked for.

    Arrays are of `numpy_dtype`, read-only, and nobody else's. `tensors` tells where each lies, `metadata` is
    the file's own text, by key. A file of a bundle is checked to be what was verified before and after it is read.

    Raises:
        BundleError: the file cannot be read, or does not follow the format.
    """

    def __init__(self, source: str | os.PathLike[str] | OpenFile) -> None:
        self._file = source if isinstance(source, OpenFile) else OpenFile(source)
        self.path = self._file.path
        try:
            size = self._file.identity.size
            if size < _LENGTH_BYTES:
                raise self._malformed(f"it has {size} bytes")
            length = int.from_bytes(self._file.read(0, _LENGTH_BYTES), "little")
            if length > min(_MAX_HEADER, size - _LENGTH_BYTES):
                raise self._malformed(f"its header claims {length} bytes and the file has {size}")
            header = self._file.read(_LENGTH_BYTES, length)
            self.metadata, self.tensors = self._parse(header, _LENGTH_BYTES + length, size)
            self.check()
        except BaseException:
            self._file.close()
            raise

    def _malformed(self, problem: str) -> BundleError:
        return BundleError(f"{self.path} is not a weights file: {problem}; copy or build the bundle again")

    def _parse(self, header: bytes, start: int, size: int) -> tuple[dict[str, str], dict[str, StoredTensor]]:
        """What the library checks itself: tensors follow each other without gaps and fill the file."""
        try:
            entries = parse_json(header)
            if not isinstance(entries, dict):
                raise ValueError(f"its header is a {type(entries).__name__}")
            metadata = entries.pop("__metadata__", {})
            if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
                raise ValueError("its metadata are not texts by name")
            tensors = {name: _stored(name, entry) for name, entry in entries.items()}
        except ValueError as error:
            raise self._malformed(str(error)) from error
        end = 0
        for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
            if tensor.offset != end:
                raise self._malformed(
                    f"tensor {name!r} begins at byte {tensor.offset} of the data, expected {end}"
                )
            end += tensor.nbytes
        if start + end != size:
            raise self._malformed(f"its tensors take {end} bytes and it has {size - start} for them")
        return metadata, {
            name: replace(tensor, offset=start + tensor.offset) for name, tensor in tensors.items()
        }

    def check(self) -> None:
        """See that a bundle's file still is what was verified.

        Raises:
            BundleIntegrityError: it is not.
        """
        if isinstance(self._file, BundleFile):
            self._file.check()

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._read(self.tensors[name])

    def rows(self, name: str, rows: Iterable[int]) -> NDArray[Any]:
        """Some rows of a tensor, read one by one: of a table of tokens, few are needed.

        Raises:
            BundleError: there is no such tensor or row.
        """
        entry = self._entry(name)
        count, *shape = entry.shape
        picked = list(rows)
        if any(not 0 <= row < count for row in picked):
            raise BundleError(
                f"tensor {name!r} of {self.path} has {count} rows, and one of {max(picked)} is wanted"
            )
        size = entry.nbytes // count
        found = [
            self._read(StoredTensor(entry.dtype, tuple(shape), entry.offset + row * size, size))
            for row in picked
        ]
        return np.stack(found) if found else np.empty((0, *shape), numpy_dtype(entry.dtype))

    def get_required(self, name: str) -> NDArray[Any]:
        """The tensor called `name`; `BundleError` if the file has none."""
        return self._read(self._entry(name))

    def read_finite(self, name: str) -> NDArray[Any]:
        """Like `get_required`, for a tensor of numbers that must be finite.

        Raises:
            BundleError: values are not finite.
        """
        array = self.get_required(name)
        if not is_finite(array, self.tensors[name].dtype):
            raise BundleError(
                f"tensor {name!r} of {self.path} holds values that are not finite; build the bundle again from weights "
                f"that are intact"
            )
        return array

    def _entry(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise BundleError(f"the weights file {self.path} has no tensor {name!r}; rebuild the bundle")
        return self.tensors[name]

    def _read(self, entry: StoredTensor) -> NDArray[Any]:
        memory = np.empty(entry.nbytes, dtype=np.uint8)
        self._file.read_into(entry.offset, memory)
        array = memory.view(numpy_dtype(entry.dtype)).reshape(entry.shape)
        array.flags.writeable = False
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def close(self) -> None:
        """Close the file. May be called twice."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_EXPONENTS: Final[Mapping[str, int]] = {
    "float32": 0x7F800000,
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float8_e4m3fn": 0x7F,
}
"""The bits of each type that are all set in what is not finite, and in nothing else."""
_AT_ONCE: Final = 1 << 18
"""Bytes that are looked at together, so that they stay in the caches."""


def is_finite(array: NDArray[Any], dtype: Dtype) -> bool:
    """Whether an array of a type, without gaps, holds finite numbers only; types that have no others do."""
    mask = _EXPONENTS.get(dtype)
    if mask is None:
        return True
    bits = array.reshape(-1).view(f"u{array.itemsize}")
    step = _AT_ONCE // array.itemsize
    return all((bits[start : start + step] & mask).max() != mask for start in range(0, bits.size, step))
