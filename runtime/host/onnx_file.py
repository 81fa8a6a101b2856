"""What an ONNX file says about weights that lie in other files, read without the package `onnx`.

The file is protocol buffers: fields of a number and a type. Of a model, only the way to its tensors is walked, by the
numbers of onnx.proto3: graphs, nodes and their attributes, functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Bundle

__all__ = ["ExternalTensor", "external_tensors", "read_external"]

_MODEL, _GRAPH, _NODE, _ATTRIBUTE, _FUNCTION, _SPARSE, _TENSOR = range(7)
_CHILDREN: Final[Mapping[int, Mapping[int, int]]] = {
    _MODEL: {7: _GRAPH, 25: _FUNCTION},
    _GRAPH: {1: _NODE, 5: _TENSOR, 15: _SPARSE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 22: _SPARSE, 23: _SPARSE},
    _FUNCTION: {7: _NODE, 11: _ATTRIBUTE},
    _SPARSE: {1: _TENSOR, 2: _TENSOR},
}
"""By kind of message: the numbers of the fields that lead to tensors, and the kind that each holds."""
_INITIALIZER: Final = (_MODEL, _GRAPH, _TENSOR)
_DEPTH: Final = 64
"""Messages in messages; the deepest that PyTorch writes are a dozen."""
_DIMS, _TYPE, _NAME, _EXTERNAL, _LOCATION = 1, 2, 8, 13, 14
_IN_ANOTHER_FILE: Final = 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_NUMPY: Final[Mapping[int, type[np.generic]]] = {
    1: np.float32,
    2: np.uint8,
    3: np.int8,
    6: np.int32,
    7: np.int64,
    9: np.bool_,
    10: np.float16,
    11: np.float64,
    16: np.uint16,
    17: np.uint8,
}
"""By number of the type in ONNX; bfloat16 (16) and float8 (17) as their bits."""


@dataclass(frozen=True)
class ExternalTensor:
    """An initializer whose values are `length` bytes of `file` (a path in the bundle) from `offset` on.

    `type` is the number of its type in ONNX, `dtype` NumPy's, or what has as many bits.
    """

    name: str
    type: int
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


def external_tensors(model: bytes, path: str) -> list[ExternalTensor]:
    """The initializers of `model` whose values lie elsewhere; `path` is that of its file in the bundle.

    Raises:
        ValueError: it is no ONNX model, or has values elsewhere that are no initializers of its main graph.
    """
    try:
        return [
            _external(fields, names, PurePosixPath(path).parent)
            for names, fields in _tensors(memoryview(model), (_MODEL,))
            if fields.get(_LOCATION) == [_IN_ANOTHER_FILE]
        ]
    except IndexError:
        raise ValueError("it ends in the middle of a number") from None


def read_external(bundle: Bundle, tensors: list[ExternalTensor]) -> dict[str, NDArray[np.generic]]:
    """The values of `tensors` by name, in memory.

    Raises:
        BundleError: they lie in a file that is not of the bundle, or shorter.
        BundleIntegrityError: that file is another one than was verified.
    """
    values: dict[str, NDArray[np.generic]] = {}
    for name in dict.fromkeys(tensor.file for tensor in tensors):
        with bundle.opened(name) as file:
            for tensor in tensors:
                if tensor.file == name:
                    memory = np.empty(tensor.length, dtype=np.uint8)
                    file.read_into(tensor.offset, memory)
                    values[tensor.name] = memory.view(tensor.dtype).reshape(tensor.shape)
            file.check()
    return values


Fields = dict[int, list[int | memoryview]]


def _tensors(message: memoryview, kinds: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Fields]]:
    """Every tensor in a message of the last of `kinds`, with the kinds of the messages around it."""
    if len(kinds) > _DEPTH:
        raise ValueError(f"messages lie {_DEPTH} deep in each other")
    fields = _fields(message)
    if kinds[-1] == _TENSOR:
        yield kinds, fields
        return
    for number, kind in _CHILDREN[kinds[-1]].items():
        for part in fields.get(number, ()):
            if isinstance(part, int):
                raise ValueError(f"field {number} is a number and no message")
            yield from _tensors(part, (*kinds, kind))


def _fields(message: memoryview) -> Fields:
    found: Fields = {}
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        value: int | memoryview
        if wire == _VARINT:
            value, at = _varint(message, at)
        elif wire in (_BYTES, _FIXED64, _FIXED32):
            size, at = _varint(message, at) if wire == _BYTES else (8 if wire == _FIXED64 else 4, at)
            value = message[at : at + size]
            at += size
            if at > len(message):
                raise ValueError("it ends in the middle")
        else:
            raise ValueError(f"it has a field of type {wire}")
        found.setdefault(number, []).append(value)
    return found


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where what follows begins."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("it has a number of more than ten bytes")


def _external(fields: Fields, kinds: tuple[int, ...], folder: PurePosixPath) -> ExternalTensor:
    name = _text(fields, _NAME)
    if kinds != _INITIALIZER:
        raise ValueError(f"tensor {name!r} has its values in another file and is no initializer")
    where: dict[str, str] = {}
    for entry in fields.get(_EXTERNAL, ()):
        if isinstance(entry, int):
            raise ValueError(f"tensor {name!r} does not say where its values are")
        pair = _fields(entry)
        where[_text(pair, 1)] = _text(pair, 2)
    kind = fields.get(_TYPE, [0])[-1]
    if not isinstance(kind, int) or kind not in _NUMPY:
        raise ValueError(f"tensor {name!r} has the type {kind!r}, and its values are in another file")
    dtype = np.dtype(_NUMPY[kind])
    shape = tuple(_dims(fields))
    length = math.prod(shape) * dtype.itemsize
    offset = int(where.get("offset", "0"))
    if not where.get("location") or offset < 0 or int(where.get("length", str(length))) != length:
        raise ValueError(f"tensor {name!r} of shape {list(shape)} has its values at {where}")
    return ExternalTensor(name, kind, dtype, shape, str(folder / where["location"]), offset, length)


def _dims(fields: Fields) -> Iterator[int]:
    """Sizes are written one by one, or packed into one field."""
    for value in fields.get(_DIMS, ()):
        if isinstance(value, int):
            yield value
            continue
        at = 0
        while at < len(value):
            size, at = _varint(value, at)
            yield size


def _text(fields: Fields, number: int) -> str:
    value = fields.get(number, [memoryview(b"")])[-1]
    if isinstance(value, int):
        raise ValueError(f"field {number} is a number and no text")
    return bytes(value).decode("utf-8")
