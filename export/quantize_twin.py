"""The float32 twin of a bfloat16 graph, for runtimes that compute no bfloat16 (ONNX Runtime on a CPU)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

__all__ = ["float32_twin"]


def float32_twin(model: ir.Model) -> ir.Model:
    """Turn every bfloat16 tensor of `model` into a float32 one, in place, and return it.

    Weights and scales keep their (rounded) values, so the twin of a quantized graph has the same FP8 weights and
    differs from an engine of the original by its activations' rounding only. Inputs and outputs become float32 too.
    Weights are widened when the model is saved.
    """
    graph = model.graph
    for value in (*graph.inputs, *graph.initializers.values()):
        _widen(value)
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.BFLOAT16:
            value.const_value = _lazy(tensor)
    for node in graph.all_nodes():
        for value in node.outputs:
            _widen(value)
        target = node.attributes.get("to") if node.op_type == "Cast" else None
        if target is not None and target.as_int() == ir.DataType.BFLOAT16:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
    return model


def _widen(value: ir.Value) -> None:
    if value.dtype == ir.DataType.BFLOAT16:
        value.type = ir.TensorType(ir.DataType.FLOAT)


def _lazy(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    def wide() -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)

    shape = tensor.shape
    assert isinstance(shape, ir.Shape)
    return ir.LazyTensor(wide, dtype=ir.DataType.FLOAT, shape=shape, name=tensor.name)
