"""Formats of the block linears for a budget of output error: the fastest that a calibration allows, as predicted.

Times are those of `export.estimate.roofline`, at the target's peak rates; errors are what a calibration measured.
Where all layers share an engine, all linears of a kind have one format; where each layer has its own, each linear has,
and the error of its kind is shared out by what each linear's own output is off.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from export.errors import InputError
from export.quantize.calibration import Calibration
from export.quantize.formats import QuantPrecision
from export.quantize.graph import KINDS, is_block_linear
from export.quantize.numerics import Format
from export.quantize.search import Choice, Option, Point, frontier, within
from export.request.plan import PlanRequest
from export.request.sizes import CONDITIONER_LINEARS, layer_linears
from export.request.targets import Precision
from runtime import bundle

from .elementwise import activation_bytes
from .roofline import Workload, rate_of

__all__ = ["FoundFormats", "find_formats", "linear_seconds"]

_SHOWN = 24
"""Points of the frontier that are kept for the manifest."""


@dataclass(frozen=True)
class FoundFormats:
    """What a search found.

    Attributes:
        precision: the narrowest format in use; bf16 where nothing is quantized.
        skip: what differs from it, as `QuantizationRequest.skip` takes it.
        search: for the manifest.
    """

    precision: QuantPrecision | None
    skip: tuple[str, ...]
    search: bundle.FormatSearch


def linear_seconds(request: PlanRequest) -> dict[str, float]:
    """Seconds that one layer's linears take in one clip, by kind, in the request's precision and at peak rates.

    What is written of a linear's input, and read once more where nothing else does that before it is quantized, is
    counted with it. Those of the conditioner run once.

    Raises:
        InputError: a peak rate that is needed is not known.
    """
    peak, workload = request.target.peak, Workload(request)
    if peak is None:
        raise InputError(
            f"no peak rates of {request.target.name} are known, so no time can be predicted for it"
        )
    for format in workload.formats:
        rate_of(peak, format)
    forwards = sum(
        len(workload.schedule.rows(chunk)) + (chunk > 0 and workload.schedule.clean_forward)
        for chunk in range(workload.planned_chunks)
    )
    seconds = {}
    for linear in layer_linears(workload.dit):
        once = linear.kind in CONDITIONER_LINEARS
        tokens = workload.dit.text_len if once else workload.tokens
        moved = activation_bytes(request.precision, tokens, linear.columns)
        if linear.kind in ("self_attn.o", "cross_attn.o") and request.precision in ("fp8", "nvfp4"):
            moved += tokens * linear.columns * workload.item
        time = workload.linear(linear.kind, tokens).seconds(peak) + moved / (peak.memory_gb_s * 1e9)
        seconds[linear.kind] = time * (1 if once else forwards)
    return seconds


def find_formats(
    request: PlanRequest,
    formats: Iterable[QuantPrecision],
    calibration: Calibration,
    budget: float,
    *,
    each: bool = False,
) -> FoundFormats:
    """The fastest formats whose output error is predicted to be within `budget`.

    Args:
        request: what is built; its precision does not matter.
        formats: that may be chosen, besides bf16.
        budget: relative L2 error of what the model predicts in a forward.
        each: every linear has a format of its own.

    Raises:
        InputError: the calibration measured no output errors, or as `linear_seconds`.
    """
    if not calibration.output_errors:
        raise InputError(
            "--precision auto needs a calibration that measured output errors, and this one did not; run `python -m "
            "export calibrate` again"
        )
    layers = request.preset.dit.layers
    tried: tuple[Precision, ...] = ("bf16", *formats)
    times = {format: linear_seconds(replace(request, precision=format)) for format in tried}
    choices = []
    for kind in KINDS:
        names = [f"blocks.{layer}.{kind}" for layer in range(layers)] if each else [f"*.{kind}"]
        for name in names:
            options = [Option("bf16", times["bf16"][kind] * layers / len(names), 0.0)]
            for format in formats:
                share = _share(calibration, name, format) if each else 1.0
                error = calibration.output_errors[kind][format] * share
                options.append(Option(format, times[format][kind] * layers / len(names), error))
            choices.append(Choice(name, tuple(options)))
    points = frontier(choices)
    chosen = within(points, budget)
    by_name = chosen.by_name(choices)
    precision: QuantPrecision | None = next((f for f in ("nvfp4", "fp8") if f in chosen.formats), None)
    return FoundFormats(
        precision,
        tuple(f"{name}={format}" for name, format in by_name.items() if format != precision),
        bundle.FormatSearch(
            budget=budget,
            error=chosen.error,
            seconds=chosen.seconds,
            frontier=tuple((point.seconds, point.error) for point in _some(points, chosen)),
        ),
    )


def _share(calibration: Calibration, name: str, format: Format) -> float:
    """The share of one linear in the output error of its kind: as its own output's error among those of its kind."""
    kind = is_block_linear(name)
    squares = {
        other: errors[format] ** 2
        for other, errors in calibration.errors.items()
        if is_block_linear(other) == kind
    }
    total = sum(squares.values())
    return (squares[name] / total) ** 0.5 if total else 0.0


def _some(points: Sequence[Point], chosen: Point) -> list[Point]:
    """The ends of a frontier, the chosen point, and others evenly between."""
    if len(points) <= _SHOWN:
        return list(points)
    step = (len(points) - 1) / (_SHOWN - 2)
    kept = {round(step * index) for index in range(_SHOWN - 1)} | {points.index(chosen)}
    return [points[index] for index in sorted(kept)]
