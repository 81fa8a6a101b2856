"""Element types: the one table of what each is called by the formats and libraries that a bundle meets.

The table holds names and sizes only, so that it costs nothing to import; numpy is asked when a type of it is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal, cast, get_args

import numpy as np

__all__ = [
    "ELEMENT_TYPES",
    "FLOATS",
    "AnyDtype",
    "Dtype",
    "ElementType",
    "dtype_name",
    "dtypes_by",
    "nbytes",
    "numpy_dtype",
]

Dtype = Literal[
    "float32", "float16", "bfloat16", "float8_e4m3fn", "float4_e2m1", "int32", "int64", "uint8", "bool"
]
"""Element types of a bundle's tensors. `float4_e2m1` is packed two to a byte along the last axis; weights files hold
it as uint8."""

AnyDtype = Dtype | Literal["int8", "int16"]
"""Those, and what only kernels and engines have inside."""

FLOATS: Final[tuple[Dtype, ...]] = ("float32", "float16", "bfloat16")
"""What activations may be in."""


@dataclass(frozen=True)
class ElementType:
    """One row of the table.

    Attributes:
        bits: of one element.
        short: as reports, engine names and expectations have it.
        onnx: the member of ONNX's `DataType`.
        tensorrt: the member of TensorRT's `DataType`, or None.
        safetensors: the name in weights files, or None where they know no such type.
        triton: the name in signatures of Triton's kernels, or None.
    """

    bits: int
    short: str
    onnx: str
    tensorrt: str | None
    safetensors: str | None
    triton: str | None

    @property
    def precision(self) -> str:
        """What a graph is called that computes in this type of float; with its scales, fp4 is NVFP4."""
        return "nvfp4" if self.short == "fp4" else self.short

    @property
    def onnxruntime(self) -> str:
        """The type of a tensor as ONNX Runtime and operator schemas write it."""
        return f"tensor({self.onnx.lower()})"


ELEMENT_TYPES: Final[Mapping[AnyDtype, ElementType]] = MappingProxyType(
    {
        "float32": ElementType(32, "fp32", "FLOAT", "FLOAT", "F32", "fp32"),
        "float16": ElementType(16, "fp16", "FLOAT16", "HALF", "F16", "fp16"),
        "bfloat16": ElementType(16, "bf16", "BFLOAT16", "BF16", "BF16", "bf16"),
        "float8_e4m3fn": ElementType(8, "fp8", "FLOAT8E4M3FN", "FP8", "F8_E4M3", "fp8e4nv"),
        "float4_e2m1": ElementType(4, "fp4", "FLOAT4E2M1", "FP4", None, None),
        "int64": ElementType(64, "int64", "INT64", "INT64", "I64", "i64"),
        "int32": ElementType(32, "int32", "INT32", "INT32", "I32", "i32"),
        "int16": ElementType(16, "int16", "INT16", None, "I16", "i16"),
        "int8": ElementType(8, "int8", "INT8", "INT8", "I8", "i8"),
        "uint8": ElementType(8, "uint8", "UINT8", "UINT8", "U8", "u8"),
        "bool": ElementType(8, "bool", "BOOL", "BOOL", "BOOL", "i1"),
    }
)


def dtypes_by(column: Literal["short", "onnx", "tensorrt", "safetensors", "triton"]) -> dict[str, Dtype]:
    """The table read the other way: what a format or library calls a type -> the type, of those that bundles hold."""
    names = {getattr(ELEMENT_TYPES[dtype], column): dtype for dtype in get_args(Dtype)}
    return {name: dtype for name, dtype in names.items() if name is not None}


def dtype_name(dtype: object) -> Dtype:
    """The element type that a `dtype` of PyTorch, numpy or ml_dtypes is.

    Raises:
        KeyError: it is none that bundles hold.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in get_args(Dtype):
        raise KeyError(f"bundles hold no {dtype}; expected one of {', '.join(get_args(Dtype))}")
    return cast(Dtype, name)


def nbytes(dtype: AnyDtype, shape: Iterable[int]) -> int:
    """Bytes of a tensor without gaps."""
    return math.prod(shape) * ELEMENT_TYPES[dtype].bits // 8


def numpy_dtype(dtype: Dtype) -> np.dtype[Any]:
    """The numpy type of an element type; bfloat16 and float8 come from ml_dtypes, packed float4 is uint8."""
    if dtype == "float4_e2m1":
        return np.dtype(np.uint8)
    if dtype in ("bfloat16", "float8_e4m3fn"):
        import ml_dtypes

        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, dtype))
        return found
    return np.dtype(dtype)
