"""Both operators in ONNX models: opaque nodes at export, function bodies attached afterwards.

The exporter of PyTorch inlines every function it is given, so a graph keeps one node per operator only in this order:
export with `export_table()`, which emits opaque nodes, then `attach` the bodies. The result runs in any ONNX runtime;
a runtime with kernels of its own overrides the bodies by the operators' names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import onnx
import onnx_ir as ir
import torch
from onnxscript import values

from plugins import contract
from plugins.contract import HSAAttributes, QKPrepareAttributes
from plugins.errors import ContractError, PluginError
from runtime.bundle import ELEMENT_TYPES, FLOATS

from . import bodies as onnx_bodies
from . import ops
from .bodies import OPSET, AttentionForm

__all__ = ["OPSET", "AttentionForm", "attach", "body", "export_table"]

_FORMS: Final = ("dense", "scan")

_ATTRIBUTE_TYPES: Final = {
    "scale": onnx.defs.OpSchema.AttrType.FLOAT,
    "eps": onnx.defs.OpSchema.AttrType.FLOAT,
    "keep_q20": onnx.defs.OpSchema.AttrType.INTS,
}
_COMPUTE_TYPES: Final = [ELEMENT_TYPES[dtype].onnxruntime for dtype in FLOATS]
_OTHER_TYPES: Final = {"frame_slots": "tensor(int32)", "chunk": "tensor(int32)"} | dict.fromkeys(
    ("q_mean", "k_mean", "past_kmean", "cos", "sin"), "tensor(float)"
)


def body(op_type: str, form: AttentionForm = "scan") -> ir.Function:
    """The function body of one operator.

    Args:
        op_type: `"HierarchicalSparseAttention"` or `"QKPrepare"`.
        form: how attention computes; `QKPrepare` has one form.

    Raises:
        PluginError: an unknown operator or form.
    """
    if form not in _FORMS:
        raise PluginError(f"unknown attention form {form!r}; expected one of {', '.join(_FORMS)}")
    if op_type == contract.HIERARCHICAL_SPARSE_ATTENTION:
        return onnx_bodies.hierarchical_sparse_attention(form)
    if op_type == contract.QK_PREPARE:
        return onnx_bodies.qk_prepare()
    raise PluginError(
        f"unknown operator {op_type!r}; expected {contract.HIERARCHICAL_SPARSE_ATTENTION} or {contract.QK_PREPARE}"
    )


def attach(model: ir.Model, form: AttentionForm = "scan") -> None:
    """Give both operators their bodies, in place; bodies that are there already are replaced.

    Raises:
        PluginError: the model's opset is not the bodies', or `form` is unknown.
        ContractError: a node of either operator has missing, unknown or invalid attributes, or the wrong number of
            inputs or outputs.
    """
    found = model.opset_imports.get("")
    if found != OPSET:
        raise PluginError(
            f"the model uses ONNX opset {found}, the operators' bodies opset {OPSET}, and both must be the same; "
            f"export the model with opset_version={OPSET}"
        )
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain == contract.DOMAIN:
            _check_node(node)
    for op_type in (contract.HIERARCHICAL_SPARSE_ATTENTION, contract.QK_PREPARE):
        function = body(op_type, form)
        model.functions[function.identifier()] = function
    model.opset_imports[contract.DOMAIN] = contract.VERSION


def _check_node(node: ir.Node) -> None:
    """Hold a node to the contract."""
    attributes: type[HSAAttributes] | type[QKPrepareAttributes]
    if node.op_type == contract.HIERARCHICAL_SPARSE_ATTENTION:
        attributes, names = HSAAttributes, contract.HSA_ATTRIBUTES
        inputs, outputs = contract.HSA_INPUTS, contract.HSA_OUTPUTS
    elif node.op_type == contract.QK_PREPARE:
        attributes, names = QKPrepareAttributes, contract.QK_PREPARE_ATTRIBUTES
        inputs, outputs = contract.QK_PREPARE_INPUTS, contract.QK_PREPARE_OUTPUTS
    else:
        raise ContractError(
            f"node {node.name!r} is {node.domain}::{node.op_type}, which has no body; expected "
            f"{contract.HIERARCHICAL_SPARSE_ATTENTION} or {contract.QK_PREPARE}"
        )
    who = f"{node.op_type} node {node.name!r}"
    if len(node.inputs) != len(inputs) or None in node.inputs:
        raise ContractError(f"{who} has {len(node.inputs)} inputs; expected {', '.join(inputs)}")
    if len(node.outputs) != len(outputs):
        raise ContractError(f"{who} has {len(node.outputs)} outputs; expected {', '.join(outputs)}")
    given = {name: value.value for name, value in node.attributes.items() if name != "plugin_namespace"}
    if set(given) != set(names):
        raise ContractError(f"{who} has attributes {sorted(given)}; expected {sorted(names)}")
    attributes(**given)


def _schema(
    op_type: str, inputs: Sequence[str], outputs: Sequence[str], attributes: Sequence[str]
) -> onnx.defs.OpSchema:
    """The operator's schema; it stays unregistered, so importing this module changes nothing for other users."""
    schema = onnx.defs.OpSchema

    def parameter(name: str) -> onnx.defs.OpSchema.FormalParameter:
        return schema.FormalParameter(name, _OTHER_TYPES.get(name, "T"))

    return schema(
        op_type,
        contract.DOMAIN,
        contract.VERSION,
        inputs=[parameter(name) for name in inputs],
        outputs=[parameter(name) for name in outputs],
        attributes=[
            schema.Attribute(name, _ATTRIBUTE_TYPES.get(name, schema.AttrType.INT), required=True)
            for name in attributes
        ],
        type_constraints=[("T", _COMPUTE_TYPES, "the compute type")],
    )


def export_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The `custom_translation_table` with which `torch.onnx.export(dynamo=True)` emits one node per operator call.

    Pass the exported model to `attach` afterwards. For node creation any compute type will do, bfloat16 included.
    """
    opset = values.Opset(contract.DOMAIN, contract.VERSION)
    attention = values.Op(
        opset,
        contract.HIERARCHICAL_SPARSE_ATTENTION,
        _schema(
            contract.HIERARCHICAL_SPARSE_ATTENTION,
            contract.HSA_INPUTS,
            contract.HSA_OUTPUTS,
            contract.HSA_ATTRIBUTES,
        ),
    )
    prepare = values.Op(
        opset,
        contract.QK_PREPARE,
        _schema(
            contract.QK_PREPARE,
            contract.QK_PREPARE_INPUTS,
            contract.QK_PREPARE_OUTPUTS,
            contract.QK_PREPARE_ATTRIBUTES,
        ),
    )

    # The exporter reads these signatures: annotated parameters become attributes, the others inputs.
    def translate_attention(  # type: ignore[no-untyped-def]
        q,
        k,
        v,
        q_mean,
        k_mean,
        past_k,
        past_v,
        past_kmean,
        frame_slots,
        chunk,
        frame_tokens: int,
        block_q: int,
        block_k: int,
        keep_frames: int,
        sink_frames: int,
        near_frames: int,
        scale: float,
        keep_q20: Sequence[int],
    ):
        return attention(
            q,
            k,
            v,
            q_mean,
            k_mean,
            past_k,
            past_v,
            past_kmean,
            frame_slots,
            chunk,
            frame_tokens=frame_tokens,
            block_q=block_q,
            block_k=block_k,
            keep_frames=keep_frames,
            sink_frames=sink_frames,
            near_frames=near_frames,
            scale=scale,
            keep_q20=keep_q20,
        )

    def translate_prepare(  # type: ignore[no-untyped-def]
        qkv,
        bias,
        norm_q,
        norm_k,
        cos,
        sin,
        heads: int,
        frame_tokens: int,
        block_q: int,
        block_k: int,
        eps: float,
    ):
        return prepare(
            qkv,
            bias,
            norm_q,
            norm_k,
            cos,
            sin,
            heads=heads,
            frame_tokens=frame_tokens,
            block_q=block_q,
            block_k=block_k,
            eps=eps,
        )

    namespace = getattr(torch.ops, contract.DOMAIN)
    return {
        getattr(namespace, ops.HIERARCHICAL_SPARSE_ATTENTION).default: translate_attention,
        getattr(namespace, ops.QK_PREPARE).default: translate_prepare,
    }
