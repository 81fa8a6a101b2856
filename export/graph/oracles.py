"""The reference's function for each attention operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from torch import Tensor

from lightforcing_ref.attention import hsa_attention
from lightforcing_ref.policies import (
    persistent_block_attention,
    radial_attention,
    sliding_tile_attention,
    sparge_attention,
    sparse_linear_attention,
    vmoba_attention,
)
from plugins import contract

__all__ = ["ORACLES"]

ORACLES: Final[Mapping[str, Callable[..., Tensor]]] = MappingProxyType(
    {
        contract.HIERARCHICAL_SPARSE_ATTENTION: hsa_attention,
        contract.SLIDING_TILE: sliding_tile_attention,
        contract.RADIAL: radial_attention,
        contract.SPARGE: sparge_attention,
        contract.VMOBA: vmoba_attention,
        contract.PERSISTENT_BLOCK: persistent_block_attention,
        contract.SPARSE_LINEAR: sparse_linear_attention,
    }
)
