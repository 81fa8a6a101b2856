"""What is to be built: the request that the command line, the backends and the tests share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from export.errors import InputError
from lightforcing_ref.config import Preset

from .geometry import StepPlan
from .targets import BackendName, Precision, Target, Variant, unknown_name
from .weights import Weights

__all__ = ["BuildRequest", "Execution", "PlanRequest", "QuantizationRequest", "planned_precision"]

Execution = Literal["whole", "segmented"]


@dataclass(frozen=True)
class QuantizationRequest:
    """How the block linears are quantized, where the precision is fp8 or nvfp4.

    Attributes:
        static: whether activations have calibrated scales in place of one per token.
        calibration: file of the ranges; needed where `static`, and otherwise a source of measured errors.
        skip: patterns of linears that stay in bf16 ("blocks.0.*"), or "auto" for those above an error threshold.
    """

    static: bool = False
    calibration: Path | None = None
    skip: tuple[str, ...] = ()


@dataclass(frozen=True)
class BuildRequest:
    """What to build, from what, and where to put it.

    Attributes:
        height, width: of the video, in pixels.
        weights: the model, and where its weights come from.
        per_chunk: also write a step graph for each chunk.
        execution: the step as one graph, or cut into segments.
        embedded: segments hold their weights, an engine per layer; otherwise weights are inputs of one engine.
        command: command line, for the manifest.
    """

    target: Target
    variant: Variant
    weights: Weights
    height: int
    width: int
    backend: BackendName
    precision: Precision
    out: Path
    name: str
    per_chunk: bool = False
    execution: Execution = "whole"
    embedded: bool = False
    quantization: QuantizationRequest = QuantizationRequest()
    command: str = ""

    @property
    def preset(self) -> Preset:
        """The model's dimensions."""
        return self.weights.preset

    @property
    def plan(self) -> StepPlan:
        """The request in numbers; see `StepPlan.of` for the errors."""
        blocks = self.variant.blocks(self.target, self.preset.block)
        return StepPlan.of(
            self.preset, self.variant, self.height, self.width, block_q=blocks.query, block_k=blocks.key
        )


@dataclass(frozen=True)
class PlanRequest:
    """What is planned: a model and a variant of it on a target. Sizes in pixels."""

    target: Target
    variant: Variant
    preset: Preset
    height: int
    width: int
    precision: Precision


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
