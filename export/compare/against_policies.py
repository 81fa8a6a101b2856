"""One checkpoint under several methods of selection, against full attention: what each costs, and what it looks at."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich import box
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from export.request.geometry import StepPlan
from export.request.targets import Variant
from runtime.bundle import Bundle, Manifest, load_bundle

from .against_reference import decoded, facts_of, reference_embedding
from .reference import Reference, variant_of
from .result import Comparison, Film, Row, difference, psnr
from .selection import Recording
from .trials import SEED

__all__ = ["PolicyResult", "compare_policies", "policy_table", "with_policy"]


@dataclass(frozen=True)
class PolicyResult:
    """One method.

    Attributes:
        kept: mean share of the resident keys that queries saw after the first chunk, counted; None = one chunk only.
        relative: L2 error of the clip's latents against full attention.
        psnr: of the frames, in dB; None where they are equal.
        seconds: PREDICTED for the variant's planned clip, at peak rates; None where no rates are known.
    """

    policy: str
    kept: float | None
    relative: float
    psnr: float | None
    seconds: float | None


def compare_policies(
    path: Path,
    policies: Sequence[str],
    *,
    chunks: int = 3,
    predicted: Callable[[Variant], float | None] = lambda _: None,
    reference: Reference | None = None,
) -> tuple[list[PolicyResult], Comparison]:
    """Roll out the model of the bundle at `path` under each method, and under full attention.

    The bundle may be for any target: its model, variant and weights are what counts. Its own method keeps its
    parameters, others have their defaults.

    Args:
        policies: names of methods.
        chunks: length of the rollouts.
        predicted: seconds of a variant's planned clip.
        reference: the model with the bundle's weights; None = rebuilt from what the manifest names.

    Returns:
        one result for each method, and the same as a comparison with frames, for a report.

    Raises:
        BundleError: the bundle cannot be used.
        ComparisonError: the reference's weights are needed and were not given.
        ConfigError, InputError: a method does not exist, or does not fit the model.
    """
    bundle = load_bundle(path)
    reference = reference or Reference.of(bundle.manifest)
    return _Study(bundle, reference, chunks, predicted).run(policies)


def with_policy(manifest: Manifest, reference: Reference, name: str) -> tuple[Variant, Manifest]:
    """The variant and the manifest of a bundle, had it been built for another method."""
    variant = variant_of(manifest).with_policy(name)
    model, attention = manifest.model, manifest.attention
    plan = StepPlan.of(
        reference.preset,
        variant,
        model.video_height,
        model.video_width,
        block_q=attention.block_q,
        block_k=attention.block_k,
    )
    sections = plan.manifest_sections()
    changed = {name: sections[name] for name in ("attention", "sparsity", "cache")}
    return variant, manifest.model_copy(update=changed)


class _Study:
    def __init__(
        self,
        bundle: Bundle,
        reference: Reference,
        chunks: int,
        predicted: Callable[[Variant], float | None],
    ) -> None:
        self.bundle, self.manifest, self.reference = bundle, bundle.manifest, reference
        self.chunks, self.predicted = chunks, predicted
        self.embedding = reference_embedding(bundle, reference)
        block, tokens = self.manifest.attention.block_k, self.manifest.model.frame_tokens
        starts = np.arange(0, tokens, block)
        self.key_rows = np.minimum(block, tokens - starts).astype(np.float32)

    def run(self, policies: Sequence[str]) -> tuple[list[PolicyResult], Comparison]:
        _, _, expected = self._latents("dense")
        films = [Film("dense", decoded(self.reference, expected))]
        results, rows = [], []
        for name in policies:
            variant, kept, latents = self._latents(name)
            gap = difference(latents.numpy(), expected.numpy())
            film = Film(name, decoded(self.reference, latents))
            signal = psnr(film.frames, films[0].frames)
            results.append(PolicyResult(name, kept, gap.relative, signal, self.predicted(variant)))
            rows.append(Row("rollout", name, 1, "latents", gap.relative, gap.largest, math.inf, signal))
            films.append(film)
        comparison = Comparison(
            title=f"{self.manifest.name}: methods of selection against full attention",
            bundle=self.manifest.name,
            facts=facts_of(self.bundle),
            tools=self.manifest.provenance.tools,
            rows=rows,
            films=films,
        )
        return results, comparison

    def _latents(self, name: str) -> tuple[Variant, float | None, Tensor]:
        variant, manifest = with_policy(self.manifest, self.reference, name)
        recording = Recording()
        rollout = self.reference.rollout(manifest, self.embedding, SEED, kernels=recording.kernels())
        latents = torch.cat(list(rollout.stream(self.chunks)), dim=1)
        return variant, recording.share(self.key_rows), latents


def policy_table(results: Sequence[PolicyResult], title: str) -> Table:
    """One line for each method."""
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, caption_justify="left")
    for heading in ("policy", "keys seen", "error", "PSNR", "predicted"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for result in results:
        table.add_row(
            result.policy,
            "-" if result.kept is None else f"{result.kept:.1%}",
            f"{result.relative:.1e}",
            "equal" if result.psnr is None else f"{result.psnr:.1f} dB",
            "-" if result.seconds is None else f"{result.seconds:.3g} s",
        )
    table.caption = (
        "keys seen: counted, mean over layers, heads and chunks after the first; error: of the latents, relative L2 "
        "norm against full attention; predicted: the planned clip at peak rates, not measured"
    )
    return table
