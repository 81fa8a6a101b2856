"""PyTorch custom ops of the operators: schemas and shape inference, without a computation of their own.

`torch.ops.lightforcing.hierarchical_sparse_attention`, `torch.ops.lightforcing.qk_prepare`, both over codes
(`..._fp8`, and `hierarchical_sparse_attention_e4m3` with products of eight bits), and one op for each other method
(`OPS`) exist once this module is imported, and can be traced and exported then. `bind` gives them a kernel per device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor
from torch.library import Library

from plugins import contract, operators
from plugins.contract import AttentionAttributes, QKPrepareAttributes
from plugins.errors import PluginError, UnboundOperatorError
from plugins.operators import Operator
from plugins.shapes import hsa_output_shapes, qk_prepare_output_shapes

__all__ = [
    "HIERARCHICAL_SPARSE_ATTENTION",
    "HIERARCHICAL_SPARSE_ATTENTION_E4M3",
    "HIERARCHICAL_SPARSE_ATTENTION_FP8",
    "NAMES",
    "OPS",
    "QK_PREPARE",
    "QK_PREPARE_FP8",
    "bind",
]

HIERARCHICAL_SPARSE_ATTENTION: Final = "hierarchical_sparse_attention"
QK_PREPARE: Final = "qk_prepare"
HIERARCHICAL_SPARSE_ATTENTION_E4M3: Final = "hierarchical_sparse_attention_e4m3"
HIERARCHICAL_SPARSE_ATTENTION_FP8: Final = "hierarchical_sparse_attention_fp8"
QK_PREPARE_FP8: Final = "qk_prepare_fp8"

OPS: Final[Mapping[str, str]] = MappingProxyType(
    {
        contract.HIERARCHICAL_SPARSE_ATTENTION: HIERARCHICAL_SPARSE_ATTENTION,
        contract.SLIDING_TILE: "sliding_tile_attention",
        contract.RADIAL: "radial_attention",
        contract.SPARGE: "sparge_attention",
        contract.VMOBA: "vmoba_attention",
        contract.PERSISTENT_BLOCK: "persistent_block_attention",
        contract.SPARSE_LINEAR: "sparse_linear_attention",
    }
)
"""Attention operator -> its op."""

NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {
        **{name: operator for operator, name in OPS.items()},
        QK_PREPARE: contract.QK_PREPARE,
        HIERARCHICAL_SPARSE_ATTENTION_E4M3: operators.HIERARCHICAL_SPARSE_ATTENTION_E4M3,
        HIERARCHICAL_SPARSE_ATTENTION_FP8: operators.HIERARCHICAL_SPARSE_ATTENTION_FP8,
        QK_PREPARE_FP8: operators.QK_PREPARE_FP8,
    }
)
"""Op -> operator."""

_TYPES: Final[Mapping[contract.AttributeKind, str]] = {"int": "int", "float": "float", "ints": "int[]"}


def _schema(operator: Operator) -> str:
    parameters = [f"Tensor {name}" for name in operator.inputs]
    parameters += [f"{_TYPES[kind]} {name}" for name, kind in operator.attributes.items()]
    results = ", ".join(["Tensor"] * len(operator.outputs))
    return f"({', '.join(parameters)}) -> {results if len(operator.outputs) == 1 else f'({results})'}"


Kernel = Callable[..., Any]

# A reload must not drop what is bound: the registrations live as long as these objects.
_bound: dict[str, Library] = globals().get("_bound", {})


def _arguments(
    operator: Operator, args: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], AttentionAttributes | QKPrepareAttributes, dict[str, tuple[Any, ...]]]:
    """Split positional arguments into tensors and attributes, validated; also the shapes of the outputs."""
    count = len(operator.inputs)
    tensors = args[:count]
    attributes = operator.made(**dict(zip(operator.attributes, args[count:], strict=True)))
    shapes = {name: tensor.shape for name, tensor in zip(operator.inputs, tensors, strict=True)}
    if isinstance(attributes, QKPrepareAttributes):
        codes = operator.over_codes
        return tensors, attributes, qk_prepare_output_shapes(attributes, shapes, codes=codes)
    return tensors, attributes, hsa_output_shapes(attributes, shapes)


def _fake(operator: Operator) -> Kernel:
    codes = ("k", "v") if operator.over_codes else ()

    def dtype(name: str, compute: torch.dtype) -> torch.dtype:
        if name in codes:
            return torch.uint8
        return torch.float32 if name.endswith(("_mean", "_scale")) else compute

    def call(*args: Any) -> Any:
        tensors, _, shapes = _arguments(operator, args)
        made = [
            tensors[0].new_empty(shapes[name], dtype=dtype(name, tensors[0].dtype))
            for name in operator.outputs
        ]
        return made[0] if len(made) == 1 else tuple(made)

    return call


def _unbound(name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        raise UnboundOperatorError(
            f"{contract.DOMAIN}::{name} was called on device {args[0].device.type!r}, for which no kernel is bound; "
            "call plugins.nodes.ops.bind with kernels for this device (the export package binds the reference on 'cpu')"
        )

    return call


def _define() -> None:
    for name, of in NAMES.items():
        if hasattr(getattr(torch.ops, contract.DOMAIN), name):
            continue  # this module was reloaded, or another copy of it was imported before
        operator, qualified = operators.OPERATORS[of], f"{contract.DOMAIN}::{name}"
        torch.library.define(qualified, _schema(operator), tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(qualified, "default", _unbound(name))
        torch.library.register_fake(qualified, _fake(operator))


def bind(
    device: str,
    *,
    hsa: Kernel,
    qk_prepare: Kernel,
    methods: Mapping[str, Kernel] = MappingProxyType({}),
    codes: tuple[Kernel, Kernel, Kernel] | None = None,
) -> None:
    """Make the ops callable on one type of device; binding again replaces the kernels.

    The kernels get the op's tensors by position and its attributes by keyword. Shapes and attributes have been
    checked before they are called, and their results are made contiguous, as the ops' schemas promise.

    Args:
        device: `"cpu"` or `"cuda"`.
        hsa: kernel of `hierarchical_sparse_attention`.
        qk_prepare: kernel of `qk_prepare`.
        methods: kernels of other methods, by operator; one that is not named raises `UnboundOperatorError`.
        codes: kernels of `qk_prepare_fp8`, `hierarchical_sparse_attention_fp8` and `..._e4m3`; None leaves them
            uncallable.

    Raises:
        PluginError: another device.
    """
    if device not in ("cpu", "cuda"):
        raise PluginError(f"cannot bind kernels for device {device!r}; expected 'cpu' or 'cuda'")
    kernels = {HIERARCHICAL_SPARSE_ATTENTION: hsa, QK_PREPARE: qk_prepare}
    kernels |= {OPS[operator]: kernel for operator, kernel in methods.items()}
    if codes is not None:
        over_codes = (QK_PREPARE_FP8, HIERARCHICAL_SPARSE_ATTENTION_FP8, HIERARCHICAL_SPARSE_ATTENTION_E4M3)
        kernels |= dict(zip(over_codes, codes, strict=True))
    _bound.pop(device, None)  # dropping the library withdraws its kernels
    library = Library(contract.DOMAIN, "IMPL")
    for name, kernel in kernels.items():
        run = _checked(operators.OPERATORS[NAMES[name]], kernel)
        # Another copy of this module may have bound one.
        library.impl(name, run, device.upper(), allow_override=True)
    _bound[device] = library


def _checked(operator: Operator, kernel: Kernel) -> Kernel:
    def run(*args: Any) -> Any:
        tensors, attributes, _ = _arguments(operator, args)
        results = kernel(*tensors, **attributes.as_dict())
        if isinstance(results, Tensor):
            return results.contiguous()
        return tuple(result.contiguous() for result in results)

    return run


_define()
