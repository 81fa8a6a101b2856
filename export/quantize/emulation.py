"""NVFP4 in operators that any runtime has: what TensorRT's FP4 operators compute, in float32.

The numbers are those of `quantize_numerics`; four-bit tensors become float32 tensors of the values that they stand for.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.errors import ExportError

from .numerics import FP4_BLOCK, FP4_MAX

__all__ = ["emulate_fp4", "unpack_fp4"]

_FOUR, _EIGHT, _FLOAT = ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT
_DYNAMIC = "TRT_FP4DynamicQuantize"


def unpack_fp4(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The values of E2M1 codes `[..., K / 2]`, two to a byte and the first one in the low half: float32 `[..., K]`."""
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    table = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return np.asarray(table[codes])


def emulate_fp4(model: ir.Model) -> None:
    """Replace the FP4 operators of `model`, whose other tensors are float32 or FP8, in place.

    Inputs and initializers of four bits become float32. `model` is left alone where it has none.

    Raises:
        ExportError: an operator is used in another way than `quantize_graph` writes it.
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type == _DYNAMIC:
            _Emulation(graph, node).quantize()
    for node in list(graph):
        if node.op_type == "DequantizeLinear" and "block_size" in node.attributes:
            _Emulation(graph, node).dequantize()
    for value in (*graph.inputs, *graph.initializers.values()):
        if value.dtype == _FOUR:
            tensor, value.type = value.const_value, ir.TensorType(_FLOAT)
            if tensor is not None:
                packed = np.frombuffer(tensor.tobytes(), dtype=np.uint8)
                array = unpack_fp4(packed).reshape(tensor.shape.numpy())
                value.const_value = ir.tensor(array, name=tensor.name)


class _Emulation:
    """Builds what takes the place of one node."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node = graph, node
        size = node.attributes.get("block_size")
        if size is None or size.as_int() != FP4_BLOCK:
            raise ExportError(f"{node.name!r} quantizes in blocks of {size}; expected {FP4_BLOCK}")

    def constant(self, array: NDArray[np.generic]) -> ir.Value:
        tensor = ir.tensor(array, name=f"{self.node.name}.emulated.{len(self.graph.initializers)}")
        value = ir.Value(
            name=tensor.name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value

    def __call__(
        self, op_type: str, *inputs: ir.Value | float, dtype: ir.DataType = _FLOAT, **attributes: int
    ) -> ir.Value:
        values = [
            value if isinstance(value, ir.Value) else self.constant(np.array(value, dtype=np.float32))
            for value in inputs
        ]
        output = ir.Value(type=ir.TensorType(dtype))
        self.graph.insert_before(self.node, ir.node(op_type, values, attributes, outputs=[output]))
        return output

    def shaped(self, value: ir.Value, *dims: int) -> ir.Value:
        return self("Reshape", value, self.constant(np.array(dims, dtype=np.int64)))

    def axis(self) -> ir.Value:
        return self.constant(np.array([-1], dtype=np.int64))

    def dims(self) -> list[int]:
        """Shape of what is quantized."""
        value = self.node.inputs[0]
        dims = [] if value is None or value.shape is None else [d for d in value.shape if isinstance(d, int)]
        if value is None or value.shape is None or len(dims) != len(value.shape):
            raise ExportError(f"{self.node.name!r} quantizes a tensor of unknown shape")
        return dims

    def inputs(self) -> list[ir.Value]:
        return [value for value in self.node.inputs if value is not None]

    def finish(self, *results: ir.Value) -> None:
        for old, new in zip(self.node.outputs, results, strict=True):
            old.replace_all_uses_with(new)
            new.name, old.name, new.shape = old.name, f"{old.name}.replaced", old.shape
        self.graph.remove(self.node, safe=True)

    def quantize(self) -> None:
        dims = self.dims()
        blocks = self.shaped(self.inputs()[0], *dims[:-1], -1, FP4_BLOCK)
        largest = self("ReduceMax", self("Abs", blocks), self.axis(), keepdims=0)
        scales = self("Cast", self("Div", largest, FP4_MAX), dtype=_EIGHT, to=int(_EIGHT))
        wide = self("Unsqueeze", self("Cast", scales, to=int(_FLOAT)), self.axis())
        present = self("Greater", wide, 0.0, dtype=ir.DataType.BOOL)
        scaled = self("Where", present, self("Div", blocks, self("Where", present, wide, 1.0)), 0.0)
        magnitude = self("Abs", scaled)
        # Spacing of the E2M1 values; Round takes ties to the even multiple, which has the even code.
        coarse = self("Where", self("Less", magnitude, 4.0, dtype=ir.DataType.BOOL), 1.0, 2.0)
        step = self("Where", self("Less", magnitude, 2.0, dtype=ir.DataType.BOOL), 0.5, coarse)
        rounded = self("Mul", self("Round", self("Div", magnitude, step)), step)
        values = self("Mul", self("Min", rounded, FP4_MAX), self("Sign", scaled))
        self.finish(self.shaped(values, *dims), scales)

    def dequantize(self) -> None:
        dims = self.dims()
        values, scales = self.inputs()[:2]
        blocks = self(
            "Mul", self.shaped(values, *dims[:-1], -1, FP4_BLOCK), self("Unsqueeze", scales, self.axis())
        )
        self.finish(self.shaped(blocks, *dims))
