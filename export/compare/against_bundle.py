"""Two bundles of one model against each other: segmented and whole, one backend and another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from export.errors import ComparisonError
from export.tolerances import PIXELS, ROLLOUT_FACTOR
from runtime.bundle import Bundle

from .against_reference import (
    bundle_runner,
    facts_of,
    layer_plot,
    measure,
    open_bundle,
    play,
    step_plot,
    tolerance_of,
)
from .reference import synthetic_feeds
from .result import Comparison, Film, film_rows
from .trials import Trials

__all__ = ["against_bundle"]

_EQUAL = ("model", "schedule", "attention", "sparsity", "cache", "text", "vae")
"""Sections of the manifest that must be equal for two bundles to compute the same."""

_OWN = ("tokenizer", "weights", "caches")
"""Fields in them that are each bundle's own affair: file names, and the types of the decoder's caches."""


def _require_alike(one: Bundle, other: Bundle) -> None:
    for section in _EQUAL:
        ours = getattr(one.manifest, section).model_dump()
        theirs = getattr(other.manifest, section).model_dump()
        for name in ours:
            if name not in _OWN and ours[name] != theirs[name]:
                raise ComparisonError(
                    f"{one.manifest.name} and {other.manifest.name} are different models: {section}.{name} is "
                    f"{ours[name]} in one and {theirs[name]} in the other; compare bundles of one model and variant"
                )


def _only(bundle: Bundle, name: str, feed: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """What a component takes of a feed."""
    return {spec.name: feed[spec.name] for spec in bundle.component(name).inputs}


def against_bundle(
    path: Path,
    other: Path,
    *,
    chunks: int = 3,
    prompts: Sequence[str] = (),
    seed: int | None = None,
    tolerance: float | None = None,
) -> Comparison:
    """Compare the bundle at `path` with the one at `other`, which counts as right; no weights are needed.

    Forwards run from equal states, drawn from a seed; rollouts from the same prompt and noise.

    Args:
        chunks: length of the rollout.
        prompts, seed: what is played; by default one that the weights can show something for.
        tolerance: largest relative L2 error of one forward; None = that of the lower precision.

    Raises:
        BundleError: a bundle cannot be used.
        ComparisonError: they are not of one model, or one is for a GPU.
    """
    bundle, right = open_bundle(path), open_bundle(other)
    _require_alike(bundle, right)
    manifest = bundle.manifest
    limit = max(tolerance_of(bundle, tolerance), tolerance_of(right, tolerance))
    clean_step = manifest.schedule.clean_step
    feeds = list(synthetic_feeds(manifest, chunks))
    denoising = [feed for _, step, feed in feeds if step != clean_step]
    cleaning = [feed for _, step, feed in feeds if step == clean_step]
    measured = {
        name: measure(
            [bundle_runner(right, name), bundle_runner(bundle, name)],
            [_only(bundle, name, feed) for feed in of_component],
            scope="step",
            name=name,
            tolerance=limit,
        )
        for name, of_component in (("step", denoising), ("clean", cleaning))
    }
    trials = Trials.of(manifest, prompts, seed)
    pairs = []
    for prompt in trials.prompts:
        clips = [play(side, chunks, prompt=prompt, seed=trials.seed) for side in (right, bundle)]
        pairs.append((Film(f"{right.manifest.name} (reference)", clips[0]), Film(manifest.name, clips[1])))
    frames = film_rows(pairs, chunks, max(limit * ROLLOUT_FACTOR, PIXELS))
    steps = measured["step"]
    return Comparison(
        title=f"{manifest.name} against {right.manifest.name}",
        bundle=manifest.name,
        facts={
            **facts_of(bundle),
            **{f"reference: {name}": value for name, value in facts_of(right).items()},
        },
        tools=manifest.provenance.tools,
        rows=[*(entry.row for entry in measured.values()), *frames],
        plots=[step_plot(bundle, {"x0": steps}), layer_plot(bundle, {"": steps})],
        films=list(pairs[0]),
    )
