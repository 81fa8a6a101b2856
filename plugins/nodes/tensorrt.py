"""Make TensorRT's ONNX parser take the plugin for our operators' nodes. Needs `onnx_ir`."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from plugins import contract

__all__ = ["PLUGIN_NAMESPACE", "name_plugin"]

PLUGIN_NAMESPACE: Final = contract.DOMAIN
"""Namespace of the plugins; their names and version are those of the operators."""


def name_plugin(model: ir.Model) -> int:
    """Name the plugin's namespace on every node of both operators, in place; returns how many there are.

    Without it the parser looks into the empty namespace, finds nothing, and inlines the function body without a word,
    whatever its flag ENABLE_PLUGIN_OVERRIDE says. Other runtimes ignore the attribute.
    """
    nodes = [
        node for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.domain == contract.DOMAIN
    ]
    for node in nodes:
        node.attributes.add(ir.AttrString("plugin_namespace", PLUGIN_NAMESPACE))
    return len(nodes)
