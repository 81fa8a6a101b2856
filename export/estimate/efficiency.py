"""What share of the peak rates a clip is expected to reach: assumed, or as a bench of this GPU measured it.

A bench tells how long the transformer's and the decoder's engines took, and how long the whole did. Against the floor
of the same chunks that gives three figures, and a prediction with them gives the measured time back for what was
measured. For another precision, size or decoder it says: as far from the floor as there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from export.errors import InputError
from export.request.built import built_schedule, built_variant
from export.request.plan import PlanRequest
from export.request.schedules import SchedulePolicy
from export.request.targets import (
    Blocks,
    Target,
    Variant,
    list_variants,
)
from lightforcing_ref.config import Preset, preset
from lightforcing_ref.dimensions import DECODERS, TAEConfig
from runtime.bundle.benchmark import Benchmark, MeasuredBundle, read_benchmark

from .roofline import ChunkPrediction, ClipPrediction, predict_chunks

__all__ = ["Efficiency", "assumed", "measured"]


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peak rates.

    Attributes:
        transformer, decoder: floor over the time inside their engines.
        overlap: wall time over the time inside the engines of both: below one where decoding runs beside denoising,
            above it where the host or other sessions are waited for.
        source: where the figures come from, for tables.
        is_measured: whether a GPU has shown them.
    """

    transformer: float
    decoder: float
    overlap: float
    source: str
    is_measured: bool

    def seconds(self, floor: ChunkPrediction | ClipPrediction) -> float:
        """How long what takes `floor` at the peak rates is expected to take."""
        decoder = floor.decoder_seconds
        return self.overlap * ((floor.seconds - decoder) / self.transformer + decoder / self.decoder)

    def fps(self, floor: ClipPrediction) -> float:
        """Frames per second."""
        return floor.frames / self.seconds(floor)

    @property
    def short(self) -> str:
        """For the heading of a column."""
        return "as measured" if self.is_measured else f"at {self.transformer:.0%}"


def assumed(share: float) -> Efficiency:
    """The same share for everything, measured by nobody."""
    return Efficiency(
        share, share, 1.0, f"{share:.0%} of the peak rates, an assumption (--efficiency)", False
    )


def measured(path: Path, target: Target) -> Efficiency:
    """What the bench result in `path` says about `target`.

    Raises:
        InputError: it is no bench result, is of another target, or of work whose floor is not known.
    """
    found = read_benchmark(path)
    bundle = found.bundle
    if bundle.target.name != target.name:
        raise InputError(
            f"{path} was measured with a bundle for {bundle.target.name}, and {target.name} is planned; give a bench "
            f"of this GPU, or plan --gpu {bundle.target.name}"
        )
    floor = predict_chunks(_request(found, path, target), [chunk.index for chunk in found.chunks])
    if floor is None:
        raise InputError(
            f"{path} was measured in {bundle.precision} on {target.name}, whose peak rates are not known; add them to "
            "the target's file"
        )
    frames = sum(chunk.frames for chunk in found.chunks)
    if floor.frames != frames:
        raise InputError(
            f"{path} has chunks of {frames} frames in all; its model makes {floor.frames} of them"
        )
    denoise, decode = (sum(getattr(chunk, name) for chunk in found.chunks) for name in ("denoise", "decode"))
    if not denoise or not decode:
        raise InputError(f"{path} has no time inside the engines; measure again")
    decoder = floor.decoder_seconds
    device = found.environment.get("device", target.title)
    return Efficiency(
        transformer=(floor.seconds - decoder) / denoise,
        decoder=decoder / decode,
        overlap=found.seconds / (denoise + decode),
        source=f"{path.name}: {bundle.name}, {len(found.chunks)} chunks on {device}",
        is_measured=True,
    )


def _request(found: Benchmark, path: Path, target: Target) -> PlanRequest:
    """What was measured, as something to plan."""
    bundle = found.bundle
    model, attention = bundle.model, bundle.attention
    blocks = Blocks(query=attention.block_q, key=attention.block_k)
    return PlanRequest(
        target.model_copy(update={"blocks": blocks}),
        _variant(bundle),
        _preset(bundle, path),
        model.video_height,
        model.video_width,
        bundle.precision,
    )


def _preset(bundle: MeasuredBundle, path: Path) -> Preset:
    chosen = preset(bundle.model.preset)
    kind, widths = bundle.vae.kind, bundle.vae.widths
    for decoder in (chosen.vae, *DECODERS.values()):
        same_kind = isinstance(decoder, TAEConfig) == (kind == "tae")
        if same_kind and (widths is None or tuple(decoder.widths) == widths):
            return replace(chosen, vae=decoder)
    raise InputError(
        f"{path} was measured with a {kind} decoder of widths {widths}, which is none of {', '.join(DECODERS)}; "
        "measure a bundle with one of these"
    )


def _variant(bundle: MeasuredBundle) -> Variant:
    """The variant that the bundle was built with, but for its blocks."""
    return built_variant(
        bundle.variant,
        bundle.variant,
        _schedule(bundle),
        attention=bundle.attention,
        sparsity=bundle.sparsity,
        cache=bundle.cache,
        recache=bundle.cache.recache,
    )


def _schedule(bundle: MeasuredBundle) -> SchedulePolicy:
    """The schedule that was recorded.

    Where none was, that of the shipped variant whose name the bundle's is made from; the usual one if there is none.
    """
    if bundle.schedule is not None:
        return built_schedule(bundle.schedule, bundle.model.chunk_frames)
    name = bundle.variant
    made_from = [
        variant for variant in list_variants() if name == variant.name or name.startswith(f"{variant.name}-")
    ]
    return max(made_from, key=lambda variant: len(variant.name)).schedule if made_from else SchedulePolicy()
