"""Other sparse-attention methods of the field, as the oracle of what each of them lets a token see in a causal rollout.

Light Forcing's own selection is part of the operator (`lightforcing_ref.attention`); these stand in its place through
`PolicyAttention`. docs/policies.md says what each method defines and what is our choice.
"""

from .attention import PolicyAttention
from .operators import (
    MethodOperator,
    persistent_block_attention,
    radial_attention,
    sliding_tile_attention,
    sparge_attention,
    sparse_linear_attention,
    vmoba_attention,
)
from .pbsa import PersistentBlocks, PersistentSet, block_weights
from .radial import Radial
from .sla import SLA, SparseLinearAttention, linear_branch
from .sparge import SpargeAttention
from .sta import SlidingTile
from .view import Policy, View
from .vmoba import VMoBA

__all__ = [
    "SLA",
    "MethodOperator",
    "PersistentBlocks",
    "PersistentSet",
    "Policy",
    "PolicyAttention",
    "Radial",
    "SlidingTile",
    "SpargeAttention",
    "SparseLinearAttention",
    "VMoBA",
    "View",
    "block_weights",
    "linear_branch",
    "persistent_block_attention",
    "radial_attention",
    "sliding_tile_attention",
    "sparge_attention",
    "sparse_linear_attention",
    "vmoba_attention",
]
