"""Which linears of a build are quantized, how, and what that costs: decided before the graphs are cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir
from torch import Tensor

from export.errors import InputError
from export.progress import StepCallback
from export.request.geometry import StepPlan
from export.request.linears import AUTO, QuantPrecision, choose_formats
from export.request.request import BuildRequest
from export.request.weights import Weights
from runtime import bundle

from .calibration import Calibration, Measured, load_calibration
from .cost import seeded_error
from .formats import auto_formats
from .graph import KINDS, find_linears, is_block_linear, weight_tensor
from .numerics import FoldedWeight, Format, fold_weight

__all__ = [
    "ErrorLog",
    "Errors",
    "QuantizationPlan",
    "block_linear_names",
    "decide_formats",
    "plan_quantization",
    "refuse_without_quantization",
    "weights_identity",
]

Errors = dict[str, dict[Format, float]]


@dataclass(frozen=True)
class QuantizationPlan:
    """How the block linears of one build are quantized.

    Attributes:
        formats: by the linears' names; those without one stay in bf16. None = decided by `automatic`.
    """

    precision: QuantPrecision
    names: tuple[str, ...]
    formats: Mapping[str, Format] | None
    calibration: Calibration | None
    calibration_sha256: str | None
    static: bool
    embedded: bool
    search: bundle.FormatSearch | None = None

    @property
    def amax(self) -> Mapping[str, float] | None:
        """Static ranges of the inputs; None = a scale per token."""
        return self.calibration.amax if self.static and self.calibration is not None else None

    @property
    def importance(self) -> Mapping[str, Tensor] | None:
        """Of the linears' input channels; None = all alike."""
        return None if self.calibration is None else self.calibration.importance

    def measured(self) -> Errors | None:
        """Errors of every linear that the calibration measured; None = it measured none."""
        if self.calibration is None or not self.calibration.errors:
            return None
        fp8: Measured = "fp8_static" if self.static else "fp8"
        return {
            name: {"fp8": errors[fp8], "nvfp4": errors["nvfp4"]}
            for name, errors in self.calibration.errors.items()
        }

    def automatic(self, errors: Errors) -> dict[str, Format]:
        """The formats that keep every linear's error within its threshold."""
        return auto_formats(errors, self.precision, same_in_all_layers=not self.embedded)

    def moved(
        self, formats: Mapping[str, Format], names: list[str]
    ) -> dict[tuple[Format, Format | None], int]:
        """How many of the linears `names` are not in the format that the precision would give them: (from, to)."""
        moves: dict[tuple[Format, Format | None], int] = {}
        for name in names:
            actual = formats.get(name)
            if self.precision != actual:
                moves[self.precision, actual] = moves.get((self.precision, actual), 0) + 1
        return moves

    def section(self, formats: Mapping[str, Format], errors: Mapping[str, float]) -> bundle.Quantization:
        """The manifest's section."""
        calibration = None
        if self.calibration is not None and self.calibration_sha256 is not None:
            calibration = bundle.Calibration(
                sha256=self.calibration_sha256,
                prompts=self.calibration.prompts,
                chunks=self.calibration.chunks,
            )
        return bundle.Quantization(
            activations="static" if self.static else "dynamic",
            calibration=calibration,
            formats=dict(formats),
            errors=dict(errors),
            skipped=tuple(name for name in self.names if name not in formats),
            search=self.search,
        )


def block_linear_names(layers: int) -> tuple[str, ...]:
    """Names of all block linears of a transformer."""
    return tuple(f"blocks.{layer}.{kind}" for layer in range(layers) for kind in KINDS)


def weights_identity(weights: Weights) -> dict[str, str]:
    """What the transformer's weights come from, for calibration files."""
    if weights.checkpoint is None:
        return {"checkpoint": f"random:{weights.seed or 0}"}
    return {
        role: digest
        for role, digest in weights.digests().items()
        if role in ("checkpoint", "section") or role.startswith("lora.")
    }


def refuse_without_quantization(request: BuildRequest) -> None:
    """Refuse options about quantized linears, for a build that has none.

    Raises:
        InputError: there is such an option; names it.
    """
    wanted = request.quantization
    options = {
        "--fp8-activations static": wanted.static,
        "--calibration": wanted.calibration,
        "--skip": wanted.skip,
    }
    for option, value in options.items():
        if value:
            raise InputError(
                f"{option} is for quantized linears, and {request.precision} has none; use --precision fp8, or drop "
                "it"
            )


def plan_quantization(request: BuildRequest, plan: StepPlan) -> QuantizationPlan | None:
    """What the request says about quantization, checked; None where nothing is quantized.

    Raises:
        InputError: options that need a quantized precision or a calibration, a calibration of another model, a
            pattern that matches nothing, or layers that differ where they share one engine.
    """
    wanted = request.quantization
    if request.precision not in ("fp8", "nvfp4"):
        refuse_without_quantization(request)
        return None
    precision: QuantPrecision = request.precision
    names = block_linear_names(plan.preset.dit.layers)
    calibration, digest = None, None
    if wanted.calibration is not None:
        calibration = load_calibration(wanted.calibration)
        calibration.require(plan.preset.name, weights_identity(request.weights), wanted.calibration)
        missing = [name for name in names if name not in calibration.amax]
        if missing:
            raise InputError(f"{wanted.calibration} has no range of {missing[0]}; calibrate this model again")
        digest = bundle.hash_file(wanted.calibration)
    elif wanted.static:
        raise InputError(
            "--fp8-activations static needs ranges; pass --calibration FILE (python -m export calibrate writes one)"
        )
    formats: dict[str, Format] | None = None
    if AUTO not in wanted.skip:
        formats = choose_formats(names, precision, skip=wanted.skip)
        if not request.embedded:
            _require_uniform(formats, names)
    elif len(wanted.skip) > 1:
        raise InputError("--skip auto decides about every linear; drop the other --skip")
    return QuantizationPlan(
        precision, names, formats, calibration, digest, wanted.static, request.embedded, wanted.search
    )


def _require_uniform(formats: Mapping[str, Format], names: tuple[str, ...]) -> None:
    by_kind: dict[str, set[Format | None]] = {}
    for name in names:
        by_kind.setdefault(is_block_linear(name) or "", set()).add(formats.get(name))
    mixed = [kind for kind, found in by_kind.items() if len(found) > 1]
    if mixed:
        raise InputError(
            f"--skip is about {mixed[0]} in some layers only, and all layers share one engine; skip it in all "
            f"(--skip '*.{mixed[0]}'), or build an engine per layer (--weights embedded)"
        )


def decide_formats(
    plan: QuantizationPlan, models: Iterable[ir.Model], progress: StepCallback
) -> tuple[Mapping[str, Format], dict[str, float]]:
    """The format of every linear, and the errors in FP8 of those that are left out because they lose too much.

    Args:
        models: the graphs, not yet quantized; used only where errors decide and no calibration has measured them.
        progress: called as errors are measured.
    """
    if plan.formats is not None:
        return plan.formats, {}
    errors = plan.measured() or _seeded_errors(models, progress)
    formats = plan.automatic(errors)
    return formats, {name: found["fp8"] for name, found in errors.items() if name not in formats}


def _seeded_errors(models: Iterable[ir.Model], progress: StepCallback) -> Errors:
    """Errors of every block linear of the graphs in every format, on seeded inputs.

    Args:
        progress: called before each linear.
    """
    formats: tuple[Format, ...] = ("fp8", "nvfp4")
    linears = [linear for model in models for linear in find_linears(model)]
    errors: Errors = {}
    for done, linear in enumerate(linears):
        progress("measuring", done, len(linears))
        weight = weight_tensor(linear.weight)
        errors[linear.name] = {
            format: seeded_error(linear.name, format, weight, fold_weight(weight, format))
            for format in formats
        }
    return errors


class ErrorLog:
    """Collects the error of each linear as it is quantized: the calibration's figure, else one on seeded inputs.

    A static scale suits real inputs only; without a measured error there is none then.

    Args:
        progress: called after each linear.
        total: linears there are.
    """

    def __init__(self, plan: QuantizationPlan, progress: StepCallback, total: int) -> None:
        self._measured, self._static = plan.measured(), plan.static
        self._progress, self._total = progress, total
        self._seen: set[str] = set()
        self.errors: dict[str, float] = {}

    def __call__(self, name: str, format: Format, weight: Tensor, folded: FoldedWeight) -> None:
        if self._measured is not None:
            self.errors[name] = self._measured[name][format]
        elif not self._static or format == "nvfp4":
            self.errors[name] = seeded_error(name, format, weight, folded)
        self._seen.add(name)  # what is too small for the file of weights makes its linear be quantized again
        self._progress("quantizing", len(self._seen), self._total)
