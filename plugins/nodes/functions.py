"""The operators in ONNX models: opaque nodes at export, function bodies attached afterwards.

The exporter of PyTorch inlines every function it is given, so a graph keeps one node per operator only in this order:
export with `export_table()`, which emits opaque nodes, then `attach` the bodies. The result runs in any ONNX runtime;
a runtime with kernels of its own overrides the bodies by the operators' names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import onnx
import onnx_ir as ir
import torch
from onnxscript import values

from plugins import contract
from plugins.contract import AttentionAttributes, QKPrepareAttributes
from plugins.errors import ContractError, PluginError
from plugins.operators import OPERATORS, Operator
from runtime.bundle import ELEMENT_TYPES, FLOATS

from . import bodies as onnx_bodies
from . import ops
from .bodies import OPSET, AttentionForm

__all__ = ["OPSET", "AttentionForm", "attach", "export_table"]

_FORMS: Final = ("dense", "scan")

_ATTRIBUTE_TYPES: Final[Mapping[contract.AttributeKind, Any]] = {
    "int": onnx.defs.OpSchema.AttrType.INT,
    "float": onnx.defs.OpSchema.AttrType.FLOAT,
    "ints": onnx.defs.OpSchema.AttrType.INTS,
}
_PYTHON_TYPES: Final[Mapping[contract.AttributeKind, Any]] = {
    "int": int,
    "float": float,
    "ints": Sequence[int],
}
_COMPUTE_TYPES: Final = [ELEMENT_TYPES[dtype].onnxruntime for dtype in FLOATS]
_OTHER_TYPES: Final = dict.fromkeys(("frame_slots", "chunk", "pinned"), "tensor(int32)") | dict.fromkeys(
    ("q_mean", "k_mean", "past_kmean", "cos", "sin", "k_scale", "v_scale", "past_kscale", "past_vscale"),
    "tensor(float)",
)
_CODES: Final = dict.fromkeys(("k", "v", "past_k", "past_v"), "tensor(uint8)")
"""Types of what the operators over codes hold as codes."""


def attach(model: ir.Model, form: AttentionForm = "scan") -> None:
    """Give the operators that a model has their bodies, in place; bodies that are there already are replaced.

    Args:
        form: how attention computes; `QKPrepare` has one form.

    Raises:
        PluginError: the model's opset is not the bodies', or `form` is unknown.
        ContractError: a node of an operator has missing, unknown or invalid attributes, or the wrong number of inputs
            or outputs; or two nodes of one operator need different bodies.
    """
    if form not in _FORMS:
        raise PluginError(f"unknown attention form {form!r}; expected one of {', '.join(_FORMS)}")
    found = model.opset_imports.get("")
    if found != OPSET:
        raise PluginError(
            f"the model uses ONNX opset {found}, the operators' bodies opset {OPSET}, and both must be the same; "
            f"export the model with opset_version={OPSET}"
        )
    found_attributes: dict[str, list[AttentionAttributes | QKPrepareAttributes]] = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain == contract.DOMAIN:
            found_attributes.setdefault(node.op_type, []).append(_checked(node))
    for op_type, attributes in found_attributes.items():
        function = _body(op_type, attributes, form)
        model.functions[function.identifier()] = function
    model.opset_imports[contract.DOMAIN] = contract.VERSION


def _body(
    op_type: str, found: Sequence[AttentionAttributes | QKPrepareAttributes], form: AttentionForm
) -> ir.Function:
    operator = OPERATORS[op_type]
    if operator.prepares:
        return onnx_bodies.qk_prepare(operator)
    first = found[0]
    for other in found:
        if onnx_bodies.fixed_attributes(other) != onnx_bodies.fixed_attributes(first):
            raise ContractError(
                f"nodes of {op_type} differ in what its body is made for: {first} and {other}; expected the same in "
                "every layer"
            )
    assert not isinstance(first, QKPrepareAttributes)
    return onnx_bodies.attention(operator, first, form)


def _checked(node: ir.Node) -> AttentionAttributes | QKPrepareAttributes:
    """Hold a node to the contract; its attributes."""
    operator = OPERATORS.get(node.op_type)
    if operator is None:
        raise ContractError(
            f"node {node.name!r} is {node.domain}::{node.op_type}, which has no body; expected "
            f"{' or '.join(OPERATORS)}"
        )
    inputs, outputs, names = operator.inputs, operator.outputs, operator.attributes
    who = f"{node.op_type} node {node.name!r}"
    if len(node.inputs) != len(inputs) or None in node.inputs:
        raise ContractError(f"{who} has {len(node.inputs)} inputs; expected {', '.join(inputs)}")
    if len(node.outputs) != len(outputs):
        raise ContractError(f"{who} has {len(node.outputs)} outputs; expected {', '.join(outputs)}")
    given = {name: value.value for name, value in node.attributes.items() if name != "plugin_namespace"}
    if set(given) != set(names):
        raise ContractError(f"{who} has attributes {sorted(given)}; expected {sorted(names)}")
    return operator.made(**given)


def _schema(operator: Operator) -> onnx.defs.OpSchema:
    """The operator's schema; it stays unregistered, so importing this module changes nothing for other users."""
    schema = onnx.defs.OpSchema
    types = _OTHER_TYPES | (_CODES if operator.over_codes else {})

    def parameter(name: str) -> onnx.defs.OpSchema.FormalParameter:
        return schema.FormalParameter(name, types.get(name, "T"))

    return schema(
        operator.name,
        contract.DOMAIN,
        contract.VERSION,
        inputs=[parameter(name) for name in operator.inputs],
        outputs=[parameter(name) for name in operator.outputs],
        attributes=[
            schema.Attribute(name, _ATTRIBUTE_TYPES[kind], required=True)
            for name, kind in operator.attributes.items()
        ],
        type_constraints=[("T", _COMPUTE_TYPES, "the compute type")],
    )


def export_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The `custom_translation_table` with which `torch.onnx.export(dynamo=True)` emits one node per operator call.

    Pass the exported model to `attach` afterwards. For node creation any compute type will do, bfloat16 included.
    """
    namespace = getattr(torch.ops, contract.DOMAIN)
    return {
        getattr(namespace, name).default: _translation(OPERATORS[operator])
        for name, operator in ops.NAMES.items()
    }


def _translation(operator: Operator) -> Callable[..., Any]:
    """What the exporter calls for one op: it makes the node."""
    opset = values.Opset(contract.DOMAIN, contract.VERSION)
    node = values.Op(opset, operator.name, _schema(operator))
    inputs, attributes = operator.inputs, operator.attributes

    def translate(*args: Any, **given: Any) -> Any:
        called = signature.bind(*args, **given).arguments
        return node(*(called[name] for name in inputs), **{name: called[name] for name in attributes})

    # The exporter reads the signature: annotated parameters become attributes, the others inputs.
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    types = {name: _PYTHON_TYPES[attributes[name]] for name in attributes}
    parameters = [inspect.Parameter(name, kind) for name in inputs]
    parameters += [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in types.items()]
    signature = inspect.Signature(parameters)
    translate.__signature__ = signature  # type: ignore[attr-defined]
    translate.__annotations__ = types
    return translate
