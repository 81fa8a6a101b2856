"""Every operator by name, those over codes included: tensors, attributes, and the class that holds these.

Operators over codes take and give keys and values in eight bits, with scales beside them (docs/operators.md, "Eight
bits"); their attributes are those of the operators that they stand for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from . import contract
from .contract import AttentionAttributes, HSAAttributes, QKPrepareAttributes

__all__ = [
    "HIERARCHICAL_SPARSE_ATTENTION_E4M3",
    "HIERARCHICAL_SPARSE_ATTENTION_FP8",
    "HSA_FP8_INPUTS",
    "OPERATORS",
    "PERSISTENT_BLOCK_INPUTS",
    "QK_PREPARE_FP8",
    "QK_PREPARE_FP8_OUTPUTS",
    "SPARSE_LINEAR_INPUTS",
    "Operator",
    "operators",
]

HIERARCHICAL_SPARSE_ATTENTION_E4M3: Final = "HierarchicalSparseAttentionE4M3"
HIERARCHICAL_SPARSE_ATTENTION_FP8: Final = "HierarchicalSparseAttentionFP8"
QK_PREPARE_FP8: Final = "QKPrepareFP8"

QK_PREPARE_FP8_OUTPUTS: Final[tuple[str, ...]] = (*contract.QK_PREPARE_OUTPUTS, "k_scale", "v_scale")
HSA_FP8_INPUTS: Final[tuple[str, ...]] = (
    "q",
    "k",
    "v",
    "q_mean",
    "k_mean",
    "k_scale",
    "v_scale",
    "past_k",
    "past_v",
    "past_kmean",
    "past_kscale",
    "past_vscale",
    "frame_slots",
    "chunk",
)


PERSISTENT_BLOCK_INPUTS: Final = (*contract.HSA_INPUTS, "pinned")
SPARSE_LINEAR_INPUTS: Final = (*contract.HSA_INPUTS, "linear_weight", "linear_bias")


@dataclass(frozen=True)
class Operator:
    """One operator: its tensors and attributes by name in their order, and the class that holds the attributes."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    made: type[AttentionAttributes | QKPrepareAttributes]

    @property
    def attributes(self) -> dict[str, contract.AttributeKind]:
        """Attribute name -> kind, in the order of the schema."""
        kinds = contract.attribute_kinds(self.made)
        return {name: kinds[name] for name in contract.QK_PREPARE_ATTRIBUTES} if self.prepares else kinds

    @property
    def prepares(self) -> bool:
        """Whether it turns projections into queries, keys and values."""
        return self.made is QKPrepareAttributes

    @property
    def over_codes(self) -> bool:
        """Whether keys and values are codes."""
        return "k_scale" in (*self.inputs, *self.outputs)


_INPUTS: Final[Mapping[str, tuple[str, ...]]] = {
    contract.PERSISTENT_BLOCK: PERSISTENT_BLOCK_INPUTS,
    contract.SPARSE_LINEAR: SPARSE_LINEAR_INPUTS,
}
"""Of the attention operators with more than `HSA_INPUTS`."""


OPERATORS: Final[Mapping[str, Operator]] = {
    operator.name: operator
    for operator in (
        Operator(
            contract.QK_PREPARE, contract.QK_PREPARE_INPUTS, contract.QK_PREPARE_OUTPUTS, QKPrepareAttributes
        ),
        *(
            Operator(name, _INPUTS.get(name, contract.HSA_INPUTS), contract.HSA_OUTPUTS, made)
            for name, made in contract.ATTENTION_OPERATORS.items()
        ),
        Operator(QK_PREPARE_FP8, contract.QK_PREPARE_INPUTS, QK_PREPARE_FP8_OUTPUTS, QKPrepareAttributes),
        *(
            Operator(name, HSA_FP8_INPUTS, contract.HSA_OUTPUTS, HSAAttributes)
            for name in (HIERARCHICAL_SPARSE_ATTENTION_FP8, HIERARCHICAL_SPARSE_ATTENTION_E4M3)
        ),
    )
}
"""The operators, those over codes last."""


def operators(
    kv: str | None, products: str | None = None, attention: str = contract.HIERARCHICAL_SPARSE_ATTENTION
) -> tuple[Operator, Operator]:
    """What a layer holds: preparation and attention, over codes where `kv` is "fp8".

    Args:
        products: "fp8" where attention multiplies codes; None = in the compute type.
        attention: the attention operator of a layer whose keys and values are in the compute type.
    """
    if kv is None:
        return OPERATORS[contract.QK_PREPARE], OPERATORS[attention]
    over_codes = HIERARCHICAL_SPARSE_ATTENTION_FP8 if products is None else HIERARCHICAL_SPARSE_ATTENTION_E4M3
    return OPERATORS[QK_PREPARE_FP8], OPERATORS[over_codes]
