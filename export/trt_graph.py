"""Graph edits for TensorRT, and what its engines must compute in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import onnx_ir as ir

from plugins import contract

from .errors import ExportError
from .rtx_graph import prepare_for_rtx

__all__ = ["ProductType", "operators_of", "prepare_for_trt", "quantized_products"]

PLUGIN_NAMESPACE = "lightforcing"
"""Namespace that the plugin library registers its creators under."""

ProductType = Literal["fp8", "fp4"]


def operators_of(model: ir.Model) -> list[str]:
    """Operators of this project in `model`, by name, each once."""
    return sorted({node.op_type for node in model.graph if node.domain == contract.DOMAIN})


def prepare_for_trt(model: ir.Model, dimensions: Mapping[str, int]) -> None:
    """Edit `model` in place so that TensorRT builds it for fixed sizes, with plugins for this project's operators.

    Args:
        dimensions: sizes of symbolic dimensions.

    Raises:
        ExportError: a dimension is left open.
    """
    graph = model.graph
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None and not value.shape.is_static():
            value.shape = ir.Shape(
                [dim if isinstance(dim, int) else dimensions.get(str(dim), dim) for dim in value.shape]
            )
    for value in graph.inputs:
        if value.shape is None or any(not isinstance(dim, int) for dim in value.shape):
            raise ExportError(
                f"the input {value.name!r} has the shape {value.shape}; an engine is built for fixed sizes: give one "
                "for every symbolic dimension"
            )
    if not operators_of(model):
        prepare_for_rtx(model)
        return
    for node in graph:
        if node.domain == contract.DOMAIN:
            node.attributes["plugin_namespace"] = ir.AttrString("plugin_namespace", PLUGIN_NAMESPACE)


def quantized_products(model: ir.Model) -> dict[str, ProductType]:
    """Matrix products whose operands are quantized: node name -> the type that an engine must compute it in."""
    products: dict[str, ProductType] = {}
    for node in model.graph:
        if node.op_type != "MatMul" or node.inputs[0] is None:
            continue
        producer = node.inputs[0].producer()
        if producer is None or producer.op_type != "DequantizeLinear":
            continue
        if not node.name:
            raise ExportError("a quantized product has no name, by which it would be found in the engine")
        products[node.name] = "fp4" if "block_size" in producer.attributes else "fp8"
    return products
