# mypy: allow-untyped-calls, no-warn-return-any
"""A transformer whose block linears compute in a quantized format while its weights are trained.

Weights and activations take the values that an exported graph multiplies (`export.quantize.numerics`: dynamic scales
of tokens, the search for block scales included); gradients pass as if nothing had been rounded (straight-through
estimator, Bengio et al. 2013).
"""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from export.quantize import Format, dequantize_weight, fake_activation, fold_weight
from lightforcing_ref.model import Block, CausalWanModel

__all__ = ["quantized_twin", "straight_through"]


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """The values of `rounded` with the gradient of `x`, which it was made from."""
    return x + (rounded - x).detach()


def quantized_twin(model: CausalWanModel, format: Format) -> CausalWanModel:
    """`model` with all block linears in `format`, cross-attention's keys and values included.

    The twin has the parameters of `model` themselves: what trains one trains the other, and the state dict of `model`
    stays that of a checkpoint. Weights are rounded at each use, or once within `parametrize.cached()`.

    Args:
        model: with separate projections of q, k, v. They round as the merged one does: scales belong to output channels
            and to blocks of inputs.
    """
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for layer in twin.blocks:
        block = cast(Block, layer)
        # Their three products are one of the merged weights, which no module's input shows but that of the whole.
        inputs: list[nn.Module] = [block.self_attn]
        for part in (block.self_attn, block.cross_attn, block.ffn):
            for name, linear in part.named_children():
                if isinstance(linear, nn.Linear):
                    parametrize.register_parametrization(linear, "weight", _RoundedWeight(format))
                    if part is not block.self_attn or name == "o":
                        inputs.append(linear)
        for module in inputs:
            module.register_forward_pre_hook(_RoundedInput(format))
    return twin


class _RoundedWeight(nn.Module):
    def __init__(self, format: Format) -> None:
        super().__init__()
        self.format = format

    def forward(self, weight: Tensor) -> Tensor:
        folded = fold_weight(weight.detach(), self.format)
        return straight_through(weight, dequantize_weight(folded) * folded.post[:, None])


class _RoundedInput:
    """Rounds the first argument of a module."""

    def __init__(self, format: Format) -> None:
        self.format = format

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = inputs
        values, scale = fake_activation(x.detach(), self.format)
        return (straight_through(x, values * scale), *rest)
