"""Reading safetensors files of every type a bundle uses, mapped into memory and never copied.

The library's own numpy reader knows no float8. A file is an 8-byte little-endian length, a JSON header of that length
(tensor name to type, shape and byte range), and the tensors.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BundleError

from .manifest import Dtype

__all__ = ["StoredTensor", "WeightsFile", "numpy_dtype"]

_LENGTH_BYTES = 8
_MAX_HEADER = 100 << 20
"""Larger headers are refused, as by the safetensors library."""

_STORED: Final[Mapping[str, Dtype]] = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "I32": "int32",
    "I64": "int64",
    "U8": "uint8",
    "BOOL": "bool",
}


def numpy_dtype(dtype: Dtype) -> np.dtype[Any]:
    """The numpy type of an element type; bfloat16 and float8 come from ml_dtypes, packed float4 is uint8."""
    if dtype == "float4_e2m1":
        return np.dtype(np.uint8)
    if dtype in ("bfloat16", "float8_e4m3fn"):
        import ml_dtypes

        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, dtype))
        return found
    return np.dtype(dtype)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: ``offset`` in bytes from the start of the file."""

    dtype: Dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class WeightsFile(Mapping[str, NDArray[Any]]):
    """The tensors of a safetensors file by name, as read-only views of the mapped file.

    Arrays are of :func:`numpy_dtype`; they keep the mapping alive, so they stay valid after :meth:`close`.
    ``tensors`` tells where each lies, ``metadata`` is the file's own text, by key.

    Raises:
        BundleError: the file cannot be read, or does not follow the format.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
                if size < _LENGTH_BYTES or length > min(_MAX_HEADER, size - _LENGTH_BYTES):
                    raise self._malformed(f"its header claims {length} bytes and the file has {size}")
                header = stream.read(length)
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise BundleError(
                f"cannot read the weights file {self.path}: {error}; rebuild the bundle"
            ) from error
        self.metadata, self.tensors = self._parse(header, _LENGTH_BYTES + length, size)
        # Nothing but the arrays keeps the mapping, and with it the file, open.
        self._buffer: NDArray[np.uint8] | None = np.frombuffer(mapped, dtype=np.uint8)

    def _malformed(self, problem: str) -> BundleError:
        return BundleError(f"{self.path} is not a weights file: {problem}; copy or build the bundle again")

    def _parse(self, header: bytes, start: int, size: int) -> tuple[dict[str, str], dict[str, StoredTensor]]:
        try:
            entries: dict[str, Any] = json.loads(header)
            metadata: dict[str, str] = entries.pop("__metadata__", {})
            tensors = {}
            for name, entry in entries.items():
                shape = tuple(int(dim) for dim in entry["shape"])
                begin, end = (int(offset) for offset in entry["data_offsets"])
                if entry["dtype"] not in _STORED:
                    raise ValueError(
                        f"tensor {name!r} has the type {entry['dtype']}, expected {', '.join(_STORED)}"
                    )
                dtype = _STORED[entry["dtype"]]
                nbytes = math.prod(shape) * numpy_dtype(dtype).itemsize
                if min(shape, default=0) < 0 or begin < 0 or end - begin != nbytes or start + end > size:
                    raise ValueError(
                        f"tensor {name!r} of shape {list(shape)} claims the bytes {begin} to {end}"
                    )
                tensors[name] = StoredTensor(dtype, shape, start + begin, nbytes)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._malformed(str(error)) from error
        return metadata, tensors

    def __getitem__(self, name: str) -> NDArray[Any]:
        if self._buffer is None:
            raise BundleError(f"the weights file {self.path} is closed")
        entry = self.tensors[name]
        raw = self._buffer[entry.offset : entry.offset + entry.nbytes]
        return raw.view(numpy_dtype(entry.dtype)).reshape(entry.shape)

    def get_required(self, name: str) -> NDArray[Any]:
        """The tensor called ``name``; :class:`~runtime.errors.BundleError` if the file has none."""
        if name not in self.tensors:
            raise BundleError(f"the weights file {self.path} has no tensor {name!r}; rebuild the bundle")
        return self[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def close(self) -> None:
        """Let go of the mapping; it ends with the last array. May be called twice."""
        self._buffer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
