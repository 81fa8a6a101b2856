"""What is planned without being built. Light: planning needs neither PyTorch nor the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from export.errors import InputError

from .targets import Precision, Target, Variant, unknown_name

if TYPE_CHECKING:
    from lightforcing_ref.config import Preset
from lightforcing_ref.dimensions import VAEConfig

__all__ = ["PlanRequest", "planned_precision"]


@dataclass(frozen=True)
class PlanRequest:
    """What is planned: a model and a variant of it on a target. Sizes in pixels."""

    target: Target
    variant: Variant
    preset: Preset
    height: int
    width: int
    precision: Precision
    encoder: VAEConfig | None = None
    """The video encoder, of a bundle that has one."""
    skip: tuple[str, ...] = ()
    """Patterns of linears that are not in `precision`, as `QuantizationRequest.skip` has them."""


def planned_precision(target: Target, name: str | None) -> Precision:
    """The precision called `name`; None = fp8, as the authors' release, or the best the target has below it.

    Raises:
        InputError: there is no such precision, or the target does not compute in it.
    """
    order: tuple[Precision, ...] = ("fp8", "bf16", "fp32")
    if name is None:
        return next((p for p in order if p in target.precisions), target.precisions[0])
    known: tuple[Precision, ...] = (*order, "nvfp4")
    for precision in known:
        if precision == name:
            if precision not in target.precisions:
                raise InputError(
                    f"{target.name} ({target.sm or 'a CPU'}) does not compute in {name}; use --precision "
                    f"{' or '.join(target.precisions)}, or another --gpu"
                )
            return precision
    raise unknown_name("precision", name, known)
