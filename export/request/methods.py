"""Which operator executes a method of selection, and with what attributes. Light: planning needs no PyTorch.

Methods that keep the best blocks and nothing else are hierarchical sparse attention in one stage, on every backend; the
others are operators of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from export.errors import InputError
from plugins import contract
from runtime.bundle import AttentionPolicy, BackendName
from runtime.bundle.policies import (
    DensePolicy,
    HsaPolicy,
    PbsaPolicy,
    RadialPolicy,
    SlaPolicy,
    SpargePolicy,
    StaPolicy,
    VmobaPolicy,
    has_linear_branch,
)

from .targets import Target, Variant

__all__ = [
    "RANKED",
    "attends",
    "check_backend",
    "check_products",
    "differs_by_layer",
    "method_attributes",
    "multiplies_e4m3",
    "operator_of",
    "resolved",
]

RANKED = (
    contract.HIERARCHICAL_SPARSE_ATTENTION,
    contract.PERSISTENT_BLOCK,
    contract.SPARSE_LINEAR,
)
"""Operators that keep the best blocks, as many as the table says, and have no parameters of a method."""

_PLUGIN = (contract.HIERARCHICAL_SPARSE_ATTENTION,)
_ALL = tuple(contract.ATTENTION_OPERATORS)
_OPERATORS: Mapping[BackendName, tuple[str, ...]] = {
    "onnxruntime": _ALL,
    "tensorrt-rtx": _ALL,
    "tensorrt": _PLUGIN,
    "inductor": _ALL,
}
"""Attention operators that each backend executes."""


def operator_of(method: AttentionPolicy) -> str:
    """The operator that executes `method`."""
    if has_linear_branch(method):
        return contract.SPARSE_LINEAR
    if isinstance(method, HsaPolicy | DensePolicy | SlaPolicy):
        return contract.HIERARCHICAL_SPARSE_ATTENTION
    if isinstance(method, SpargePolicy):
        return contract.HIERARCHICAL_SPARSE_ATTENTION if method.plain else contract.SPARGE
    if isinstance(method, StaPolicy):
        return contract.SLIDING_TILE
    if isinstance(method, PbsaPolicy):
        return contract.PERSISTENT_BLOCK
    return contract.RADIAL if isinstance(method, RadialPolicy) else contract.VMOBA


def method_attributes(method: AttentionPolicy, layer: int, columns: int) -> dict[str, Any]:
    """The attributes of one layer's operator that `method` says; the others follow from geometry and budget.

    Args:
        columns: tokens of a frame's row.
    """
    if operator_of(method) in RANKED:
        return {}
    if isinstance(method, StaPolicy):
        windows = [size for window in method.windows for size in window]
        return {
            "columns": columns,
            "tile": list(method.tile),
            "windows": windows,
            "sink_frames": method.sink_frames,
        }
    if isinstance(method, RadialPolicy):
        return {"decay": method.decay, "sink_frames": method.sink_frames}
    if isinstance(method, SpargePolicy):
        cumulative = method.cumulative if method.mode == "cdf" else 0.0
        return {"similarity": method.similarity, "cumulative": cumulative, "smooth": int(method.smooth)}
    assert not isinstance(method, HsaPolicy | DensePolicy | SlaPolicy | PbsaPolicy)
    turn = layer % len(method.blocks)
    return {
        "columns": columns,
        "extent": list(method.blocks[turn]),
        "top": method.tops[turn] if method.mode == "top-k" else 0,
        "threshold": method.threshold,
        "query_block": method.query_block if method.gating == "pooled" else 0,
    }


def attends(
    method: AttentionPolicy, layers: int, columns: int, kernels: Mapping[str, Callable[..., Any]]
) -> list[Callable[..., Any]]:
    """The attention of every layer, as `lightforcing_ref.cache.CachedAttention` calls it.

    Args:
        kernels: operator -> what executes it, with the operator's inputs by position and attributes by name.
    """
    operator = operator_of(method)
    names = contract.attribute_kinds(contract.ATTENTION_OPERATORS[operator])

    def attend(layer: int) -> Callable[..., Any]:
        own = method_attributes(method, layer, columns)

        def call(*tensors: Any, **given: Any) -> Any:
            merged = {**given, **own}
            return kernels[operator](*tensors, **{name: merged[name] for name in names})

        return call

    return [attend(layer) for layer in range(layers)]


def differs_by_layer(method: AttentionPolicy) -> bool:
    """Whether layers do not all select alike, so that one graph of the operator cannot serve them."""
    return any(method_attributes(method, layer, 1) != method_attributes(method, 0, 1) for layer in (1, 2, 3))


def multiplies_e4m3(target: Target) -> bool:
    """Whether the tensor cores of `target` multiply E4M3; a host does what it is told."""
    capability = target.compute_capability
    return capability is None or tuple(map(int, capability.split("."))) >= (8, 9)


def check_products(target: Target, variant: Variant) -> None:
    """Refuse a variant whose attention multiplies codes that the target does not multiply.

    Raises:
        InputError: it does not.
    """
    if variant.products is not None and not multiplies_e4m3(target):
        raise InputError(
            f"{target.title} (compute capability {target.compute_capability}) has no products of E4M3, which begin "
            "with 8.9; drop --attention fp8: --kv fp8 alone halves the cache there, and multiplies in 16 bits"
        )


def resolved(method: AttentionPolicy, *, kernels: bool, linear: bool = False) -> AttentionPolicy:
    """The method as it is executed.

    Args:
        kernels: whether kernels execute it: VMoBA gates by pooled queries there, else token by token.
        linear: whether the model has the projections of SLA's linear branch, which that method runs then.
    """
    if isinstance(method, SlaPolicy) and linear:
        return method.model_copy(update={"linear": True})
    if isinstance(method, VmobaPolicy) and method.gating is None:
        return method.model_copy(update={"gating": "pooled" if kernels else "token"})
    return method


def check_backend(method: AttentionPolicy, backend: BackendName, execution: str, *, kernels: bool) -> None:
    """Refuse a method that a backend does not execute.

    Args:
        kernels: whether kernels execute attention where segments do the rest, or else a graph.

    Raises:
        InputError: it does not.
    """
    operator = operator_of(method)
    if operator not in _OPERATORS[backend]:
        able = ", ".join(name for name, operators in _OPERATORS.items() if operator in operators)
        if operator == contract.SPARSE_LINEAR:
            raise InputError(
                f"{backend} has no kernel for SLA's linear branch, which the checkpoint was trained with; use "
                f"--backend {able}, or a checkpoint without blocks.N.self_attn.proj_l"
            )
        raise InputError(
            f"{backend} has no kernel for the policy {method.policy}; use --backend {able}, or one of the policies "
            "hsa, dense, sla and sparge (top-k with similarity below 0), which every backend executes"
        )
    if execution != "segmented":
        return
    if kernels and isinstance(method, VmobaPolicy) and method.gating == "token":
        raise InputError(
            "the kernels of the policy vmoba choose once for a block of queries, not token by token; set "
            'gating = "pooled", or use --backend onnxruntime'
        )
    if not kernels and differs_by_layer(method):
        raise InputError(
            f"layers select in turns under the policy {method.policy}, and segments have one attention for all of "
            "them; use --execution whole"
        )
