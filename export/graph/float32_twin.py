"""The float32 twin of a bfloat16 or float16 graph, for runtimes that compute no bfloat16 (ONNX Runtime on a CPU)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

__all__ = ["float32_twin"]

_NARROW = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)


def float32_twin(model: ir.Model) -> ir.Model:
    """Turn every bfloat16 and float16 tensor of `model` into a float32 one, in place, and return it.

    Weights and scales keep their (rounded) values, so the twin of a quantized graph has the same FP8 weights and
    differs from an engine of the original by its activations' rounding only. Inputs and outputs become float32 too.
    Weights are widened when the model is saved.
    """
    graph = model.graph
    for value in (*graph.inputs, *graph.initializers.values()):
        _widen(value)
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is not None and tensor.dtype in _NARROW:
            value.const_value = _lazy(tensor)
    for node in graph.all_nodes():
        for value in node.outputs:
            _widen(value)
        target = node.attributes.get("to") if node.op_type == "Cast" else None
        if target is not None and target.as_int() in _NARROW:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
        fill = node.attributes.get("value") if node.op_type in ("ConstantOfShape", "Constant") else None
        if fill is not None and fill.as_tensor().dtype in _NARROW:
            wide = ir.tensor(fill.as_tensor().numpy().astype(np.float32))
            node.attributes["value"] = ir.AttrTensor("value", wide)
    return model


def _widen(value: ir.Value) -> None:
    if value.dtype in _NARROW:
        value.type = ir.TensorType(ir.DataType.FLOAT)


def _lazy(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def wide() -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)

    shape = tensor.shape
    assert isinstance(shape, ir.Shape)
    return ir.LazyTensor(wide, dtype=ir.DataType.FLOAT, shape=shape, name=tensor.name)
