"""What is compared on: prompts and the seed of the noise; and whether there is memory for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from export.errors import ComparisonError
from export.request.sizes import transformer_parameters
from export.units import readable_size
from lightforcing_ref.checkpoint.spec import umt5_shapes
from lightforcing_ref.config import Preset
from lightforcing_ref.shipped import CAPTIONS
from runtime.bundle import Manifest
from runtime.host_memory import memory

__all__ = ["SEED", "Trials", "check_memory"]

SEED = 3
"""Of the noise, where none is asked for."""

_USUAL = "a red square moves right"
_BASE = 2 << 30
"""Libraries, the decoder at work, and everything small."""


@dataclass(frozen=True)
class Trials:
    """Rollouts are played for each of the prompts, from the noise of one seed."""

    prompts: tuple[str, ...]
    seed: int = SEED

    @classmethod
    def of(cls, manifest: Manifest, prompts: Sequence[str] = (), seed: int | None = None) -> Trials:
        """What was asked for; by default a prompt that the bundle's weights can show something for."""
        model = manifest.model.preset
        shipped = getattr(manifest.provenance.checkpoint, "source", "") == f"shipped:{model}"
        usual = CAPTIONS[model] if shipped else _USUAL
        return cls(tuple(prompts) or (usual,), SEED if seed is None else seed)


def check_memory(manifest: Manifest, preset: Preset, copies: float) -> int:
    """Refuse a comparison that does not fit into memory; the bytes that it takes, about.

    Args:
        copies: of the transformer in float32 that are there at once. The text encoder goes before they come.

    Raises:
        ComparisonError: says what is needed and what is free.
    """
    model = manifest.model
    frames = manifest.cache.max_past_frames + model.chunk_frames
    cached = 2 * frames * model.frame_tokens * model.dim * model.layers * 4  # keys and values
    # The cache of the rollout, the pool that a graph is fed, and what comes out of two forwards.
    transformer = copies * transformer_parameters(preset.dit) * 4 + 2.5 * cached
    text = sum(prod(shape) for shape in umt5_shapes(preset.text).values()) * 4
    needed, free = int(_BASE + max(transformer, text)), memory().available
    if free is not None and free < needed:
        raise ComparisonError(
            f"the comparison takes about {readable_size(needed)} of memory and {readable_size(free)} are free; close "
            "other programs, or use a machine with more"
        )
    return needed
