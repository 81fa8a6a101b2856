"""The fields that files of a bundle are made of. Every number has a range; every part refuses what it does not know.

Ranges are wide: they keep out what no model has and what would have to be waited for, and leave it to the rest of the
manifest and to the engines to say what this one is.
"""

from __future__ import annotations

from math import prod
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

__all__ = [
    "BundlePath",
    "Count",
    "Finite",
    "Fraction",
    "FramesPerSecond",
    "NonNegative",
    "NonNegativeFloat",
    "Part",
    "Positive",
    "PositiveFloat",
    "Seed",
    "Sha256",
    "Shape",
    "Size",
    "Steps",
    "Tolerance",
]

_MOST_ELEMENTS = 1 << 40

Count = Annotated[int, Field(gt=0, le=4096)]
"""Of layers, heads, channels, or frames of a chunk: what is looped over."""
Positive = Annotated[int, Field(gt=0, le=1 << 31)]
NonNegative = Annotated[int, Field(ge=0, le=1 << 31)]
Size = Annotated[int, Field(ge=0, le=1 << 50)]
"""Bytes or elements."""
Seed = Annotated[int, Field(ge=0, lt=1 << 64)]
FramesPerSecond = Annotated[int, Field(gt=0, le=1000)]

Finite = Annotated[float, Field(ge=-1e9, le=1e9)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e18)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e9)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Tolerance = Annotated[float, Field(gt=0, le=1)]
"""Of a relative error: larger ones would let anything pass."""
Steps = Annotated[tuple[NonNegativeFloat, ...], Field(min_length=2, max_length=1001)]
"""One number for each forward of a chunk."""


def _addressable(shape: tuple[int | str, ...]) -> tuple[int | str, ...]:
    if prod(dim for dim in shape if isinstance(dim, int)) > _MOST_ELEMENTS:
        raise ValueError(f"{list(shape)} are more than {_MOST_ELEMENTS:,} elements")
    return shape


Shape = Annotated[tuple[NonNegative | str, ...], Field(max_length=8), AfterValidator(_addressable)]
"""Sizes, and names of sizes that are not known yet."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
BundlePath = Annotated[str, Field(min_length=1, max_length=1024)]


class Part(BaseModel):
    """A part of a file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, str_max_length=1 << 16)
