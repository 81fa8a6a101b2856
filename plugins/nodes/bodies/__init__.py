"""The function bodies of the operators, written in standard ONNX operators."""

from __future__ import annotations

import onnx_ir as ir

from plugins import contract
from plugins.contract import (
    AttentionAttributes,
    PersistentBlockAttributes,
    QKPrepareAttributes,
    RadialAttributes,
    SpargeAttributes,
    SparseLinearAttributes,
    VMoBAAttributes,
)
from plugins.operators import HIERARCHICAL_SPARSE_ATTENTION_E4M3, Operator

from .attention import AttentionForm
from .codes import HierarchicalCodesBody, HierarchicalE4M3Body
from .hsa import HierarchicalBody, PersistentBlockBody, SparseLinearBody
from .methods import RadialBody, SlidingTileBody, SpargeBody, VMoBABody
from .prepare import qk_prepare
from .tape import OPSET, function

__all__ = ["OPSET", "AttentionForm", "attention", "fixed_attributes", "qk_prepare"]


def fixed_attributes(attributes: AttentionAttributes | QKPrepareAttributes) -> object:
    """The attributes that an operator's body is made for; a body reads the others from its node."""
    match attributes:
        case RadialAttributes():
            return attributes
        case SpargeAttributes():
            return attributes.cumulative > 0
        case VMoBAAttributes():
            return attributes.top > 0, attributes.query_block > 0
    return None


def _hierarchical(operator: Operator) -> HierarchicalBody:
    if operator.name == HIERARCHICAL_SPARSE_ATTENTION_E4M3:
        return HierarchicalE4M3Body(operator)
    return HierarchicalCodesBody(operator) if operator.over_codes else HierarchicalBody()


def attention(operator: Operator, attributes: AttentionAttributes, form: AttentionForm) -> ir.Function:
    """The body of an attention operator in one of its forms; both compute the same."""
    body: HierarchicalBody | RadialBody | SlidingTileBody | SpargeBody | VMoBABody
    match attributes:
        case RadialAttributes():
            body = RadialBody(attributes)
        case SpargeAttributes():
            body = SpargeBody(cumulative=attributes.cumulative > 0)
        case VMoBAAttributes():
            body = VMoBABody(by_count=attributes.top > 0, pooled=attributes.query_block > 0)
        case PersistentBlockAttributes():
            body = PersistentBlockBody()
        case SparseLinearAttributes():
            body = SparseLinearBody()
        case contract.SlidingTileAttributes():
            body = SlidingTileBody()
        case contract.HSAAttributes():
            body = _hierarchical(operator)
    kinds = {
        "int": ir.AttributeType.INT,
        "float": ir.AttributeType.FLOAT,
        "ints": ir.AttributeType.INTS,
    }
    return function(
        body.b,
        operator.name,
        body.inputs,
        dict(zip(contract.HSA_OUTPUTS, [body.emit(form)], strict=True)),
        {attribute: kinds[kind] for attribute, kind in contract.attribute_kinds(type(attributes)).items()},
    )
