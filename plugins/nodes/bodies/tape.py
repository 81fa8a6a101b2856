"""Recording the nodes of a function body, written in standard ONNX operators.

Bodies compute in float32 and with integer block counts. Everything that follows from attributes alone (block tables,
reshape targets) is built from constants, so that a runtime folds it when it loads the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import onnx_ir as ir
from onnx_ir import tape

from plugins import contract

__all__ = ["OPSET", "Body", "function", "reference"]

OPSET: Final = 23
"""Opset of the bodies; a model can hold them only if its own is the same."""


class Body:
    """Records the nodes of a body: `b("Op", *inputs, **attributes)` returns the node's output.

    Every value gets a name of its own, so that subgraphs never shadow the values around them.
    """

    def __init__(self, numbers: Iterator[int] | None = None) -> None:
        self._tape = tape.Tape()
        self._numbers = itertools.count() if numbers is None else numbers
        self._constants: dict[tuple[Any, ...], ir.Value] = {}

    @property
    def nodes(self) -> Sequence[ir.Node]:
        return self._tape.nodes

    def subgraph(self) -> Body:
        """A body for a nested graph, which may use the values of this one."""
        return Body(self._numbers)

    def value(self, name: str) -> ir.Value:
        """An input of a nested graph."""
        return ir.Value(name=f"{name}_{next(self._numbers)}")

    def multi(
        self, op_type: str, inputs: Sequence[ir.Value], outputs: int, **attributes: Any
    ) -> list[ir.Value]:
        """Record a node with several outputs."""
        results = list(self._tape.op_multi_out(op_type, inputs, attributes, num_outputs=outputs))
        for result in results:
            result.name = f"{op_type.lower()}_{next(self._numbers)}"
        return results

    def __call__(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return self.multi(op_type, inputs, 1, **attributes)[0]

    def _constant(self, key: tuple[Any, ...], attribute: ir.Attr) -> ir.Value:
        if key not in self._constants:
            self._constants[key] = self("Constant", **{attribute.name: attribute})
        return self._constants[key]

    def scalar(self, value: int) -> ir.Value:
        """An int64 constant without dimensions."""
        return self._constant(("int", value), ir.AttrInt64("value_int", value))

    def int_list(self, *values: int) -> ir.Value:
        """An int64 constant with one dimension."""
        return self._constant(("ints", *values), ir.AttrInt64s("value_ints", values))

    def number(self, value: float) -> ir.Value:
        """A float32 constant without dimensions."""
        return self._constant(("float", value), ir.AttrFloat32("value_float", value))

    def attribute(self, name: str, kind: ir.AttributeType = ir.AttributeType.INT) -> ir.Value:
        """The value of one of the function's attributes."""
        field = f"value_{kind.name.lower()}"
        return self._constant(("attribute", name), ir.RefAttr(field, name, kind))

    def vector(self, *scalars: ir.Value | int) -> ir.Value:
        """A shape: integers, and scalar or one-element values."""
        parts = [
            self.int_list(x) if isinstance(x, int) else self("Reshape", x, self.int_list(1)) for x in scalars
        ]
        return self("Concat", *parts, axis=0)

    def shape(self, value: ir.Value, start: int, end: int) -> ir.Value:
        return self("Shape", value, start=start, end=end)

    def to_float32(self, value: ir.Value) -> ir.Value:
        return self("Cast", value, to=ir.DataType.FLOAT.value)


def reference(attribute: str, to: str, kind: str) -> ir.Attr:
    """A node's attribute that takes the value of one of the function's attributes."""
    return ir.RefAttr(attribute, to, ir.AttributeType[kind])


def function(
    body: Body,
    name: str,
    inputs: Sequence[ir.Value],
    outputs: Mapping[str, ir.Value],
    attributes: Mapping[str, ir.AttributeType],
) -> ir.Function:
    for output_name, value in outputs.items():
        value.name = output_name
    graph = ir.Graph(inputs, list(outputs.values()), nodes=body.nodes, opset_imports={"": OPSET}, name=name)
    declared = [ir.Attr(attribute, kind, None) for attribute, kind in attributes.items()]
    return ir.Function(contract.DOMAIN, name, graph=graph, attributes=declared)
