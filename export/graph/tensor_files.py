"""Writing safetensors files tensor by tensor, so that none of several gigabytes needs to be in memory at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from export.progress import StepCallback, no_steps
from runtime.bundle import ELEMENT_TYPES, Dtype, dtype_name, nbytes

__all__ = ["StoredTensor", "store", "write_tensors"]

_ALIGNMENT = 8


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is made when its turn to be written comes.

    Attributes:
        dtype: its element type, of those that the format knows; it has none of four bits.
        read: its bytes, row by row, little-endian.
    """

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    read: Callable[[], memoryview]

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)


def store(name: str, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], Tensor]) -> StoredTensor:
    """A PyTorch tensor, converted to `dtype` when it is written."""

    def read() -> memoryview:
        flat = make().to(dtype).contiguous().flatten()
        return flat.view(torch.uint8).numpy().data

    return StoredTensor(name, dtype_name(dtype), shape, read)


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
            "dtype": ELEMENT_TYPES[tensor.dtype].safetensors,
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
