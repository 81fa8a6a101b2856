"""Which format each linear of the blocks has where --skip makes exceptions. Nothing here needs PyTorch."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from export.errors import InputError

from .sizes import layer_linears

if TYPE_CHECKING:
    from lightforcing_ref.config import Preset

    from .targets import Precision

__all__ = ["AUTO", "QuantPrecision", "Skipping", "choose_formats", "linear_precisions"]

QuantPrecision = Literal["fp8", "nvfp4"]

AUTO = "auto"
"""The `skip` that leaves it to measured errors which linears stay in bf16."""


class Skipping(Protocol):
    """A request: what is asked of `linear_precisions`."""

    @property
    def preset(self) -> Preset: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def skip(self) -> tuple[str, ...]: ...


def linear_precisions(request: Skipping) -> dict[str, Precision]:
    """The precision of every block linear, e.g. of "blocks.3.ffn.0", in the order they run.

    What `AUTO` will leave out is not known before errors are measured: it counts as if nothing were.

    Raises:
        InputError: as `choose_formats`, or nothing is quantized and linears are skipped all the same.
    """
    dit, precision = request.preset.dit, request.precision
    names = [f"blocks.{layer}.{linear.kind}" for layer in range(dit.layers) for linear in layer_linears(dit)]
    if not request.skip or AUTO in request.skip:
        return dict.fromkeys(names, precision)
    if precision not in ("fp8", "nvfp4"):
        raise InputError(
            f"--skip is for quantized linears, and {precision} has none; use --precision fp8, or drop it"
        )
    chosen = choose_formats(names, precision, skip=request.skip)
    return {name: chosen.get(name, "bf16") for name in names}


def choose_formats(
    names: Iterable[str], precision: QuantPrecision, *, skip: Sequence[str] = ()
) -> dict[str, QuantPrecision]:
    """The format of each linear: that of `precision`, except those that `skip` names.

    Args:
        skip: patterns, as "blocks.0.*" or "*.ffn.2": what matches has no format, so that it stays in bf16; with
            "PATTERN=fp8", it is in FP8. Later ones win.

    Raises:
        InputError: a pattern matches nothing, or leads to another format than fp8 or bf16.
    """
    names = list(names)
    chosen: dict[str, QuantPrecision] = dict.fromkeys(names, precision)
    for entry in skip:
        pattern, _, format = entry.partition("=")
        matches = fnmatch.filter(names, pattern)
        if not matches:
            raise InputError(
                f"--skip {pattern!r} matches none of the {len(names)} linears; they are called "
                f"{', '.join(names[:2])}, ... (* matches anything)"
            )
        if format not in ("", "bf16", "fp8"):
            raise InputError(
                f"--skip {entry!r} leads to {format!r}; expected fp8 or bf16, which is what a pattern alone means"
            )
        for name in matches:
            chosen.pop(name, None)
            if format == "fp8":
                chosen[name] = "fp8"
    return {name: chosen[name] for name in names if name in chosen}
