"""Writing safetensors files tensor by tensor, so that none of several gigabytes needs to be in memory at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from export.progress import StepCallback, no_steps

__all__ = ["StoredTensor", "StoredType", "store", "write_tensors"]

StoredType = Literal["F32", "F16", "BF16", "F8_E4M3", "U8", "I32", "I64", "BOOL"]
"""Element types by their names in the format, which has none of four bits."""

_BYTES: dict[StoredType, int] = {
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "U8": 1,
    "I32": 4,
    "I64": 8,
    "BOOL": 1,
}
_TORCH: dict[torch.dtype, StoredType] = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is made when its turn to be written comes.

    Attributes:
        read: its bytes, row by row, little-endian.
    """

    name: str
    type: StoredType
    shape: tuple[int, ...]
    read: Callable[[], memoryview]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * _BYTES[self.type]


def store(name: str, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], Tensor]) -> StoredTensor:
    """A PyTorch tensor, converted to `dtype` when it is written."""

    def read() -> memoryview:
        flat = make().to(dtype).contiguous().flatten()
        return flat.view(torch.uint8).numpy().data

    return StoredTensor(name, _TORCH[dtype], shape, read)


def write_tensors(path: Path, tensors: Iterable[StoredTensor], progress: StepCallback = no_steps) -> None:
    """Write `tensors` to the safetensors file `path`, in their order but for those of odd sizes, which come last.

    Args:
        progress: called before each tensor, with the megabytes written so far.
    """
    ordered = sorted(tensors, key=lambda tensor: tensor.nbytes % _ALIGNMENT != 0)
    header: dict[str, object] = {}
    offset = 0
    for tensor in ordered:
        end = offset + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.type,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in ordered:
            progress("writing", file.tell() >> 20, offset >> 20)
            written = file.write(tensor.read())
            assert written == tensor.nbytes, f"{tensor.name}: {written} bytes, expected {tensor.nbytes}"
