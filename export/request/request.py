"""What is to be built: the request that the command line, the backends and the tests share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from lightforcing_ref.config import Preset
from lightforcing_ref.dimensions import VAEConfig
from runtime.bundle import FormatSearch
from runtime.bundle.policies import SlaPolicy, has_linear_branch

from .geometry import StepPlan
from .methods import resolved
from .targets import BackendName, Precision, Target, Variant
from .weights import Weights

__all__ = ["BuildRequest", "Execution", "QuantizationRequest"]

Execution = Literal["whole", "segmented"]


@dataclass(frozen=True)
class QuantizationRequest:
    """How the block linears are quantized, where the precision is fp8 or nvfp4.

    Attributes:
        static: whether activations have calibrated scales in place of one per token.
        calibration: file of the ranges; needed where `static`, and otherwise a source of measured errors.
        skip: patterns of linears that stay in bf16 ("blocks.0.*") or in fp8 ("*.ffn.2=fp8"), or "auto" for those above
            an error threshold.
        search: how `skip` and the precision were found, where a budget of error decided about them.
    """

    static: bool = False
    calibration: Path | None = None
    skip: tuple[str, ...] = ()
    search: FormatSearch | None = None


@dataclass(frozen=True)
class BuildRequest:
    """What to build, from what, and where to put it.

    Attributes:
        height, width: of the video, in pixels.
        weights: the model, and where its weights come from.
        per_chunk: also write a step graph for each chunk.
        execution: the step as one graph, or cut into segments.
        with_encoder: the bundle can start from an image or a video.
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
    with_encoder: bool = False
    quantization: QuantizationRequest = QuantizationRequest()
    command: str = ""

    def __post_init__(self) -> None:
        method = self.variant.attention
        if has_linear_branch(method) and self.weights.checkpoint is None:
            object.__setattr__(self, "weights", self.weights.with_linear_branch())
        # Other methods have no such branch: whether the weights have is looked at when the request is checked.
        linear = isinstance(method, SlaPolicy) and self.weights.transformer.linear_branch
        method = resolved(method, kernels=self.launches_kernels, linear=linear)
        if method != self.variant.attention:
            object.__setattr__(self, "variant", self.variant.model_copy(update={"attention": method}))

    @property
    def launches_kernels(self) -> bool:
        """Whether kernels of this project execute attention, or else graphs on a host."""
        return self.backend != "onnxruntime" and self.target.compute_capability is not None

    @property
    def preset(self) -> Preset:
        """The model's dimensions."""
        return self.weights.preset

    @property
    def skip(self) -> tuple[str, ...]:
        """Patterns of linears that are not in the request's precision, as `QuantizationRequest.skip` has them."""
        return self.quantization.skip

    @property
    def encoder(self) -> VAEConfig | None:
        """The video encoder, of a bundle that has one; see `Weights.vae_encoder` for the errors."""
        return self.weights.vae_encoder_config() if self.with_encoder else None

    @cached_property
    def plan(self) -> StepPlan:
        """The request in numbers, worked out once; see `StepPlan.of` for the errors."""
        blocks = self.variant.blocks(self.target, self.preset.block)
        return StepPlan.of(
            self.preset, self.variant, self.height, self.width, block_q=blocks.query, block_k=blocks.key
        )
