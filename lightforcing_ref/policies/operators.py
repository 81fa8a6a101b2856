"""The methods as operators: called as `hsa_attention` is, with attributes of their own.

They are the oracles of the operators of the same names (docs/policies.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightforcing_ref.sparsity import DENSE_Q20

from .attention import PolicyAttention
from .pbsa import PersistentBlocks
from .radial import Radial
from .sla import SparseLinearAttention
from .sparge import SpargeAttention
from .sta import SlidingTile
from .vmoba import VMoBA

__all__ = [
    "MethodOperator",
    "persistent_block_attention",
    "radial_attention",
    "sliding_tile_attention",
    "sparge_attention",
    "sparse_linear_attention",
    "vmoba_attention",
]

_Attributes = Mapping[str, Any]


@dataclass(frozen=True)
class MethodOperator:
    """A method as an operator."""

    make: Callable[[_Attributes], PolicyAttention | SparseLinearAttention]

    def __call__(self, *tensors: Tensor, **attributes: Any) -> Tensor:
        """As `hsa_attention`."""
        return self.make(attributes)(*tensors, **_geometry(attributes))

    def visible(self, *tensors: Tensor, **attributes: Any) -> Tensor:
        """What each query sees of the resident keys, bool `[H, T, K]`; arguments as for a call."""
        return self.make(attributes).visible(*tensors, **_geometry(attributes))


def _geometry(attributes: _Attributes) -> dict[str, Any]:
    names = ("frame_tokens", "block_q", "block_k", "scale")
    return {name: attributes[name] for name in names} | {"keep_q20": attributes.get("keep_q20", (DENSE_Q20,))}


def _grid(attributes: _Attributes) -> tuple[int, int]:
    tokens = attributes["frame_tokens"]
    columns = attributes.get("columns", tokens)
    return tokens // columns, columns


def _sliding_tile(attributes: _Attributes) -> PolicyAttention:
    rows, columns = attributes["tile"]
    windows = tuple(zip(*(iter(attributes["windows"]),) * 3, strict=True))
    return PolicyAttention(
        SlidingTile(windows, (rows, columns), attributes["sink_frames"]), _grid(attributes)
    )


def _radial(attributes: _Attributes) -> PolicyAttention:
    return PolicyAttention(Radial(attributes["decay"], attributes["sink_frames"]), _grid(attributes))


def _sparge(attributes: _Attributes) -> PolicyAttention:
    similarity, smooth = attributes["similarity"], bool(attributes["smooth"])
    if attributes["cumulative"]:
        policy = SpargeAttention("cdf", None, attributes["cumulative"], similarity, smooth)
    else:
        policy = SpargeAttention(similarity=similarity, smooth=smooth)
    return PolicyAttention(policy, _grid(attributes))


def _vmoba(attributes: _Attributes) -> PolicyAttention:
    frames, rows, columns = (size or None for size in attributes["extent"])
    mode, top = ("top-k", attributes["top"]) if attributes["top"] else ("threshold", 1)
    return PolicyAttention(
        VMoBA(
            (frames, rows, columns),
            mode,  # type: ignore[arg-type]
            top,
            attributes["threshold"],
            attributes["query_block"] or None,
        ),
        _grid(attributes),
    )


def _persistent(attributes: _Attributes) -> PolicyAttention:
    return PolicyAttention(PersistentBlocks(), _grid(attributes))


def _sparse_linear(_: _Attributes) -> SparseLinearAttention:
    return SparseLinearAttention()


sliding_tile_attention = MethodOperator(_sliding_tile)
"""STA. `windows` are triples in a row; a frame's tokens are rows of `columns`."""
radial_attention = MethodOperator(_radial)
"""Radial attention."""
sparge_attention = MethodOperator(_sparge)
"""SpargeAttn. `cumulative` 0 keeps what the table says."""
vmoba_attention = MethodOperator(_vmoba)
"""VMoBA. `extent` 0 is all of an axis, `top` 0 goes by `threshold`, `query_block` 0 token by token."""
persistent_block_attention = MethodOperator(_persistent)
"""PBSA. `pinned`, the last of its tensors, is how many of the past frames everybody sees whole."""
sparse_linear_attention = MethodOperator(_sparse_linear)
"""SLA with its linear branch, whose weight and bias are the last of its tensors."""
