"""Inputs and outputs of an ONNX graph, as a manifest describes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_ir as ir

from runtime.bundle import Dtype, TensorSpec

__all__ = ["tensor_specs"]

_DTYPES: Mapping[ir.DataType, Dtype] = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.FLOAT8E4M3FN: "float8_e4m3fn",
    ir.DataType.FLOAT4E2M1: "float4_e2m1",
    ir.DataType.INT32: "int32",
    ir.DataType.INT64: "int64",
    ir.DataType.UINT8: "uint8",
    ir.DataType.BOOL: "bool",
}


def tensor_specs(values: Iterable[ir.Value]) -> tuple[TensorSpec, ...]:
    """Name, type and shape of each value; a symbolic size is its name."""
    return tuple(_spec(value) for value in values)


def _spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None and value.dtype is not None and value.shape is not None
    shape = tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape)
    return TensorSpec(name=value.name, dtype=_DTYPES[value.dtype], shape=shape)
