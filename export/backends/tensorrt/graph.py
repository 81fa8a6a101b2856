"""Graph edits for TensorRT."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from export.errors import ExportError
from export.graph.rewrites import prepare_for_rtx
from plugins import contract
from plugins.nodes.tensorrt import name_plugin

__all__ = ["operator_nodes", "operators_of", "prepare_for_trt"]


def operator_nodes(model: ir.Model) -> dict[str, str]:
    """Nodes of this project's operators: name -> operator."""
    return {node.name or "": node.op_type for node in model.graph if node.domain == contract.DOMAIN}


def operators_of(model: ir.Model) -> list[str]:
    """Operators of this project in `model`, by name, each once."""
    return sorted(set(operator_nodes(model).values()))


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
    if not name_plugin(model):
        prepare_for_rtx(model)
