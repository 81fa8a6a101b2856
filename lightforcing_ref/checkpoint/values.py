"""Judging the values of weights: what no trained model holds is a damaged file, and is refused by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightforcing_ref.errors import CheckpointError

from .spec import LINEAR_BRANCH

__all__ = ["LARGEST_WEIGHT", "check_values"]

LARGEST_WEIGHT = 1e6
"""Largest magnitude of a weight that is believed; the weights of the published models stay far below."""

_MAYBE_ZERO = (".bias", f".{LINEAR_BRANCH}.weight")
"""What may be zero throughout: SLA's projections begin there, and some may never have left."""

_NAMED = 4
"""Tensors that a message names."""


def check_values(state: Mapping[str, Tensor], source: str, *, zeros: bool = False) -> None:
    """Look at every value once.

    Args:
        state: tensors by name.
        source: what the message blames.
        zeros: whether tensors may be zero throughout. Biases, and the projections of SLA's linear branch, always may.

    Raises:
        CheckpointError: a tensor holds NaN or infinity, is larger than any trained weight, or is zero throughout.
    """
    problems = [
        f"{key} {problem}" for key, value in state.items() if (problem := _problem(key, value, zeros))
    ]
    if problems:
        more = f", and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise CheckpointError(
            f"{source} holds weights that no trained model has: {', '.join(problems[:_NAMED])}{more}; the file is "
            "damaged, or a training run diverged: fetch it again, or use an earlier one"
        )


def _problem(key: str, value: Tensor, zeros: bool) -> str:
    if not value.numel():
        return ""
    low, high = (float(bound) for bound in torch.aminmax(value.detach()))
    if low != low or high != high:
        return f"holds {int(value.isnan().sum())} NaN"
    largest = max(abs(low), abs(high))
    if largest == float("inf"):
        return "is infinite"
    if largest > LARGEST_WEIGHT:
        return f"reaches {largest:.3g} (expected at most {LARGEST_WEIGHT:g})"
    if largest == 0 and not zeros and not key.endswith(_MAYBE_ZERO):
        return "is zero throughout"
    return ""
