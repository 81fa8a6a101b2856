"""How far results may be from what they are held against: relative L2 errors, all in one place.

Where the golden vectors' come from is in docs/verification.md, the linears' in docs/quantization.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

__all__ = [
    "BF16_LINEAR",
    "CODES",
    "FORWARD",
    "GOLDEN",
    "GOLDEN_LAYERS",
    "GOLDEN_PIXELS",
    "LINEAR",
    "NOISE_FACTOR",
    "PIXELS",
    "ROLLOUT_FACTOR",
]

GOLDEN: Final[Mapping[str, float]] = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 2e-2, "fp8": 5e-2, "nvfp4": 0.1}
"""Golden vectors of a component, by the coarsest type that its graph computes in: three to four times the error of the
same graph with every result rounded to its type, in NVFP4 about twice."""

GOLDEN_LAYERS: Final = 4
"""Layers inside one component that `GOLDEN` allows for; errors grow with the root of their number."""

GOLDEN_PIXELS: Final[Mapping[str, float]] = {"fp32": 2e-3, "fp16": 2e-2, "bf16": 4e-2}
"""Golden vectors of a component whose outputs are pixels: a value on the edge between two levels falls to either."""

FORWARD: Final[Mapping[str, float]] = {"fp32": 1e-4, "bf16": 0.05, "fp8": 0.15, "nvfp4": 0.3}
"""One forward against PyTorch in float32, by precision, and a rollout's latents against those of another precision.
Wide: they find faults, and whether a precision is good enough is for the frames to tell."""

ROLLOUT_FACTOR: Final = 30.0
"""How many times `FORWARD` a rollout's frames may be off: forwards feed on each other's errors."""

CODES: Final = 5e-3
"""At least this much where keys and values are codes: what lies between two of them falls to either."""

PIXELS: Final = 1e-3
"""Pixels that differ by nothing but rounding."""

LINEAR: Final[Mapping[str, float]] = {"fp8": 0.08, "nvfp4": 0.25}
"""The output of one quantized linear, by format, beyond which `--skip auto` leaves it out. On Gaussian data the errors
of the formats themselves are 0.037 and 0.134."""

BF16_LINEAR: Final = 2.0**-8
"""Relative error of a linear's output that bfloat16's rounding stays below."""

NOISE_FACTOR: Final = 3.0
"""How many times more a precision may cost than random errors of the same size: those of weights are the same in every
forward, and add up."""
