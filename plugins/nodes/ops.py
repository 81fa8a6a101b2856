"""PyTorch custom ops of the operators: schemas and shape inference, without a computation of their own.

`torch.ops.lightforcing.hierarchical_sparse_attention`, `torch.ops.lightforcing.qk_prepare` and one op for each other
method (`OPS`) exist once this module is imported, and can be traced and exported then. `bind` gives them a kernel per
device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor
from torch.library import Library

from plugins import contract
from plugins.contract import AttentionAttributes, QKPrepareAttributes
from plugins.errors import PluginError, UnboundOperatorError

__all__ = ["HIERARCHICAL_SPARSE_ATTENTION", "OPS", "QK_PREPARE", "bind"]

HIERARCHICAL_SPARSE_ATTENTION: Final = "hierarchical_sparse_attention"
QK_PREPARE: Final = "qk_prepare"

OPS: Final[Mapping[str, str]] = MappingProxyType(
    {
        contract.HIERARCHICAL_SPARSE_ATTENTION: HIERARCHICAL_SPARSE_ATTENTION,
        contract.SLIDING_TILE: "sliding_tile_attention",
        contract.RADIAL: "radial_attention",
        contract.SPARGE: "sparge_attention",
        contract.VMOBA: "vmoba_attention",
    }
)
"""Attention operator -> its op."""

_TYPES: Final[Mapping[contract.AttributeKind, str]] = {"int": "int", "float": "float", "ints": "int[]"}


def _attention_schema(operator: str) -> str:
    kinds = contract.attribute_kinds(contract.ATTENTION_OPERATORS[operator])
    tensors = [f"Tensor {name}" for name in contract.HSA_INPUTS]
    return f"({', '.join([*tensors, *(f'{_TYPES[kind]} {name}' for name, kind in kinds.items())])}) -> Tensor"


_SCHEMAS: Final = {
    **{name: _attention_schema(operator) for operator, name in OPS.items()},
    QK_PREPARE: (
        "(Tensor qkv, Tensor bias, Tensor norm_q, Tensor norm_k, Tensor cos, Tensor sin, int heads, "
        "int frame_tokens, int block_q, int block_k, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
}
AttentionKernel = Callable[..., Tensor]
QKPrepareKernel = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]

# A reload must not drop what is bound: the registrations live as long as these objects.
_bound: dict[str, Library] = globals().get("_bound", {})


def _attention_arguments(
    operator: str, args: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], AttentionAttributes, torch.Size]:
    """Split positional arguments into tensors and attributes, validated; also the output's shape."""
    count, kind = len(contract.HSA_INPUTS), contract.ATTENTION_OPERATORS[operator]
    tensors = args[:count]
    attributes = kind(**dict(zip(contract.attribute_kinds(kind), args[count:], strict=True)))
    shapes = {name: tensor.shape for name, tensor in zip(contract.HSA_INPUTS, tensors, strict=True)}
    return tensors, attributes, torch.Size(contract.hsa_output_shapes(attributes, shapes)["out"])


def _qk_prepare_arguments(
    args: tuple[Any, ...],
) -> tuple[tuple[Tensor, ...], QKPrepareAttributes, dict[str, tuple[Any, ...]]]:
    count = len(contract.QK_PREPARE_INPUTS)
    tensors = args[:count]
    attributes = QKPrepareAttributes(**dict(zip(contract.QK_PREPARE_ATTRIBUTES, args[count:], strict=True)))
    shapes = {name: tensor.shape for name, tensor in zip(contract.QK_PREPARE_INPUTS, tensors, strict=True)}
    return tensors, attributes, contract.qk_prepare_output_shapes(attributes, shapes)


def _fake_attention(operator: str) -> Callable[..., Tensor]:
    def fake(*args: Any) -> Tensor:
        tensors, _, shape = _attention_arguments(operator, args)
        return tensors[0].new_empty(shape)

    return fake


def _fake_qk_prepare(*args: Any) -> tuple[Tensor, ...]:
    tensors, _, shapes = _qk_prepare_arguments(args)
    return tuple(
        tensors[0].new_empty(
            shapes[name], dtype=torch.float32 if name.endswith("_mean") else tensors[0].dtype
        )
        for name in contract.QK_PREPARE_OUTPUTS
    )


def _unbound(name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        raise UnboundOperatorError(
            f"{contract.DOMAIN}::{name} was called on device {args[0].device.type!r}, for which no kernel is bound; "
            "call plugins.nodes.ops.bind with kernels for this device (the export package binds the reference on 'cpu')"
        )

    return call


def _define() -> None:
    fakes: dict[str, Callable[..., Any]] = {name: _fake_attention(operator) for operator, name in OPS.items()}
    fakes[QK_PREPARE] = _fake_qk_prepare
    for name, schema in _SCHEMAS.items():
        if hasattr(getattr(torch.ops, contract.DOMAIN), name):
            continue  # this module was reloaded, or another copy of it was imported before
        qualified = f"{contract.DOMAIN}::{name}"
        torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(qualified, "default", _unbound(name))
        torch.library.register_fake(qualified, fakes[name])


def bind(
    device: str,
    *,
    hsa: AttentionKernel,
    qk_prepare: QKPrepareKernel,
    methods: Mapping[str, AttentionKernel] = MappingProxyType({}),
) -> None:
    """Make the ops callable on one type of device; binding again replaces the kernels.

    The kernels get the op's tensors by position and its attributes by keyword. Shapes and attributes have been
    checked before they are called, and their results are made contiguous, as the ops' schemas promise.

    Args:
        device: `"cpu"` or `"cuda"`.
        hsa: kernel of `hierarchical_sparse_attention`.
        qk_prepare: kernel of `qk_prepare`.
        methods: kernels of other methods, by operator; one that is not named raises `UnboundOperatorError`.

    Raises:
        PluginError: another device.
    """
    if device not in ("cpu", "cuda"):
        raise PluginError(f"cannot bind kernels for device {device!r}; expected 'cpu' or 'cuda'")

    def attention(operator: str, kernel: AttentionKernel) -> Callable[..., Tensor]:
        def run(*args: Any) -> Tensor:
            tensors, attributes, _ = _attention_arguments(operator, args)
            return kernel(*tensors, **attributes.as_dict()).contiguous()

        return run

    def run_qk_prepare(*args: Any) -> tuple[Tensor, ...]:
        tensors, attributes, _ = _qk_prepare_arguments(args)
        return tuple(result.contiguous() for result in qk_prepare(*tensors, **attributes.as_dict()))

    _bound.pop(device, None)  # dropping the library withdraws its kernels
    library = Library(contract.DOMAIN, "IMPL")
    kernels = {contract.HIERARCHICAL_SPARSE_ATTENTION: hsa, **methods}
    runs: dict[str, Callable[..., Any]] = {
        OPS[operator]: attention(operator, kernel) for operator, kernel in kernels.items()
    }
    for name, run in (runs | {QK_PREPARE: run_qk_prepare}).items():
        library.impl(
            name, run, device.upper(), allow_override=True
        )  # another copy of this module may have bound one
    _bound[device] = library


_define()
