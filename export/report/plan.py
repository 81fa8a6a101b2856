"""What `python -m export plan` prints: the memory plan, and the predicted floor of every chunk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from export.estimate.efficiency import Efficiency
from export.estimate.memory import MemoryPlan, Planned, plan_memory
from export.estimate.roofline import (
    ELEMENT_WISE,
    KINDS,
    PUBLISHED,
    PUBLISHED_FRAMES,
    PUBLISHED_PRECISION,
    PUBLISHED_PRESET,
    PUBLISHED_SIZE,
    PUBLISHED_VARIANT,
    ClipPrediction,
    Kind,
    Part,
    Work,
    Workload,
    predict,
    rate_of,
)
from export.request.plan import PlanRequest
from export.request.targets import Peak, load_variant
from export.units import readable_size
from lightforcing_ref.dimensions import DECODERS, LIGHT_VAE

__all__ = ["memory_table", "plan_document", "plan_tables"]

_GOAL = 2.0
"""Times the authors' speed that this project aims at."""


# ---- memory ----


def memory_table(plan: MemoryPlan) -> Table:
    """The memory plan, one line per part, with the verdict below."""
    table = _table("Memory plan", "", "", "size", "of the peak")
    for item in plan.items:
        size = item.bytes * (plan.sessions if item.per_session else 1)
        name = f"{item.name}{f', {plan.sessions} sessions' if item.per_session and plan.sessions > 1 else ''}"
        table.add_row(item.group, name, readable_size(size), f"{size / plan.peak:.0%}")
    table.add_section()
    one_more = f", each session {readable_size(plan.per_session)} of it" if plan.sessions > 1 else ""
    table.add_row("[bold]peak[/]", f"all of it at once{one_more}", f"[bold]{readable_size(plan.peak)}[/]", "")
    table.add_row("", "besides: the text encoder's weights, streamed", readable_size(plan.host_bytes), "")
    kept = "in main memory where this is at most half of what is free"
    table.add_row(
        "", f"of them, layers, which each new prompt reads; kept {kept}", readable_size(plan.prompt_bytes), ""
    )
    colour = {True: "green", False: "bold red", None: "yellow"}[plan.fits]
    table.caption = f"[{colour}]{escape(plan.verdict)}[/]"
    return table


# ---- prediction ----


def plan_tables(
    request: Planned, sessions: int, efficiency: Efficiency, built: Mapping[str, int] | None = None
) -> Iterator[RenderableType]:
    """Everything `plan` prints; `built` is what `Workload` takes."""
    yield _heading(request)
    yield memory_table(plan_memory(request, sessions))
    clip, peak = predict(request, built), request.target.peak
    if clip is None or peak is None:
        why = (
            "no peak rates are known for it"
            if peak is None
            else f"a peak rate that {request.precision} needs is not known"
        )
        yield f"No prediction for {escape(request.target.title)}: {why}."
        return
    yield _chunks(request, clip, efficiency)
    yield _shares(clip)
    if built:
        yield _built(request, built)
    yield _roofline(request, len(clip.chunks) - 1)
    yield _rates(peak)
    yield _compared("Precisions compared (predicted)", "precision", _precisions(request), efficiency)
    yield _compared("Decoders compared (predicted)", "decoder", _decoders(request), efficiency)
    yield "\n".join(_conclusions(request, clip))


def _heading(request: Planned) -> str:
    blocks = Workload(request).geometry
    skipped = f" (--skip {' '.join(request.skip)})" if request.skip else ""
    return (
        f"[bold]{escape(request.preset.name)}[/] {request.height}x{request.width}, variant "
        f"{escape(request.variant.name)}, {request.precision}{escape(skipped)}, on {escape(request.target.title)}: "
        f"{blocks.frame_tokens} tokens per latent frame, blocks of {blocks.block_q} x {blocks.block_k}; "
        f"{request.variant.schedule.described}"
    )


def _chunks(request: Planned, clip: ClipPrediction, efficiency: Efficiency) -> Table:
    table = _table(
        "PREDICTED floor per chunk (not measured)",
        *("chunk", "frames", "key blocks", "linear", "attn", "cross", "VAE", "GB", "ms"),
        f"ms {efficiency.short}",
    )
    for chunk in clip.chunks:
        table.add_row(
            str(chunk.chunk),
            str(chunk.frames),
            f"{chunk.kept}/{chunk.total}",
            *_figures(chunk.parts),
            _ms(chunk.seconds),
            _ms(efficiency.seconds(chunk)),
        )
    table.add_section()
    for total in _totals(clip):
        table.add_row(
            "[bold]all[/]",
            str(total.frames),
            "",
            *_figures({kind: total.part(kind) for kind in KINDS}),
            f"[bold]{_ms(total.seconds)}[/]",
            f"[bold]{_ms(efficiency.seconds(total))}[/]",
        )
        table.add_row("[bold]FPS[/]", *[""] * 7, f"{total.fps:.1f}", f"{efficiency.fps(total):.1f}")
    table.caption = (
        "linear to VAE in TFLOP; ms: at 100 % of the published peak rates, every operation by itself and the longer of "
        f"arithmetic and traffic; ms {efficiency.short}: {_explained(efficiency)}. A chunk is "
        "the clean forward of the one before, the denoising forwards, and the decoding. Selection and launches are not "
        f"counted{_assumption(request)}"
    )
    return table


def _assumption(request: Planned) -> str:
    """What the key blocks rest on where the data decides."""
    workload = Workload(request)
    share = workload.own_share(workload.planned_chunks - 1)
    if share is None or share.assumption is None:
        return ""
    method = request.variant.attention.policy
    return f". How many key blocks {method} keeps depends on the data: here if {share.assumption}"


def _explained(efficiency: Efficiency) -> str:
    if not efficiency.is_measured:
        return f"the same at {escape(efficiency.source)}"
    return (
        f"as far from it as {escape(efficiency.source)}, where the transformer reached {efficiency.transformer:.0%} of "
        f"its floor, the decoder {efficiency.decoder:.0%}, and the whole took {efficiency.overlap:.2f} times what both "
        "took one after the other"
    )


def _figures(parts: Mapping[Kind, Part]) -> Iterator[str]:
    """TFLOP of what computes, GB of everything."""
    for kind in KINDS:
        if kind not in ELEMENT_WISE:
            yield f"{parts[kind].flops / 1e12:.4g}"
    yield f"{sum(part.bytes for part in parts.values()) / 1e9:.3g}"


def _shares(clip: ClipPrediction) -> Table:
    """Where the floor's time goes."""
    (total, *_) = _totals(clip)
    table = _table(
        f"Where the floor of {total.frames} frames goes (predicted)", "", "TFLOP", "GB", "ms", "of it"
    )
    for kind in KINDS:
        part = total.part(kind)
        table.add_row(
            kind,
            f"{part.flops / 1e12:.4g}" if part.flops else "",
            f"{part.bytes / 1e9:.3g}",
            _ms(part.seconds),
            f"{part.seconds / total.seconds:.0%}",
        )
    table.caption = (
        "element-wise: norms, modulations, activations, residuals, quantization, at the memory's full rate"
    )
    return table


def _totals(clip: ClipPrediction) -> list[ClipPrediction]:
    """The whole clip, and before it the 81 frames of a short one if it is longer."""
    return [clip.first(PUBLISHED_FRAMES), clip] if clip.frames > PUBLISHED_FRAMES else [clip]


def _built(request: Planned, built: Mapping[str, int]) -> Table:
    """Element-wise work of one run of each component: pass by pass, and as its engine does it."""
    workload = Workload(request)
    passes = workload.passes
    planned = {
        "first": passes.first(),
        "layer": passes.layer(),
        "last": (*passes.layer(workload.dit.layers - 1), *passes.last()),
    }
    sizes = {name: sum(one.bytes for one in found) for name, found in planned.items()}
    for name, first in (("vae_first", True), ("vae_next", False)):
        decoder = workload.decode(first=first)
        sizes[name] = sum(work.bytes for work in decoder if work.kind == "decoder, element-wise")
    table = _table("Element-wise work of one run, as built", "component", "passes, MB", "built, MB", "times")
    for name, moved in built.items():
        table.add_row(name, f"{sizes[name] / 1e6:.4g}", f"{moved / 1e6:.4g}", f"{moved / sizes[name]:.2f}")
    table.caption = "the figures above count what is built"
    return table


def _samples(request: Planned, chunk: int) -> Iterator[tuple[str, Work]]:
    workload = Workload(request)
    for kind in ("self_attn.qkv", "self_attn.o", "ffn.0", "ffn.2"):
        yield kind, workload.linear(kind)
    yield "cross-attention", workload.cross_attention
    yield "self-attention", workload.attention(chunk)
    yield "the same, dense", workload.attention(chunk, dense=True)
    passes = (workload.passes.prepare(), *workload.passes.layer())
    yield from zip((one.name for one in passes), workload.moved(passes), strict=True)


def _roofline(request: Planned, chunk: int) -> Table:
    peak = request.target.peak
    assert peak is not None
    table = _table(
        f"Roofline of one layer, chunk {chunk} (predicted)",
        *("operation", "in", "GFLOP", "MB", "FLOP/B", "ridge", "limit", "us"),
    )
    for name, work in _samples(request, chunk):
        table.add_row(
            name,
            work.format,
            f"{work.flops / 1e9:.4g}" if work.flops else "",
            f"{work.bytes / 1e6:.3g}",
            f"{work.flops / work.bytes:.0f}" if work.flops else "",
            f"{rate_of(peak, work.format) / (peak.memory_gb_s * 1e9):.0f}",
            "compute" if work.is_compute_bound(peak) else "memory",
            f"{work.seconds(peak) * 1e6:.3g}",
        )
    table.caption = "ridge: operations per byte from which on arithmetic, not memory, sets the time"
    return table


def _compared(
    title: str, first: str, entries: Iterable[tuple[str, PlanRequest]], efficiency: Efficiency
) -> Table:
    """The same clip in several ways."""
    columns = ("weights", "peak memory", "s", "FPS", f"s {efficiency.short}", f"FPS {efficiency.short}")
    table = _table(title, first, *columns)
    for name, request in entries:
        clip = predict(request)
        if clip is not None:
            memory = plan_memory(request)
            table.add_row(
                name,
                readable_size(memory.group("weights")),
                readable_size(memory.peak),
                f"{clip.seconds:.3g}",
                f"{clip.fps:.1f}",
                f"{efficiency.seconds(clip):.3g}",
                f"{efficiency.fps(clip):.1f}",
            )
    return table


def _precisions(request: Planned) -> Iterator[tuple[str, PlanRequest]]:
    if request.skip:
        yield f"{request.precision}, as planned", _planned(request)
    for precision in request.target.precisions:
        yield precision, replace(_planned(request), precision=precision, skip=())


def _decoders(request: Planned) -> Iterator[tuple[str, PlanRequest]]:
    """Decoders of this model's latents: those as large as its own, not the toys of the tests."""
    planned = _planned(request)
    toys = {"tiny", "tiny-tae"}
    for name, decoder in DECODERS.items():
        if (name in toys) == (planned.preset.vae in [DECODERS[toy] for toy in toys]):
            yield name, replace(planned, preset=replace(planned.preset, vae=decoder))


def _rates(peak: Peak) -> Table:
    table = _table("Peak rates (dense products)", "operands", "sums in", "TFLOPS", "source")
    table.columns[-1].justify = "left"
    for rate in peak.rates:
        table.add_row(rate.operands, rate.accumulator, f"{rate.tflops:g}", escape(rate.source))
    table.add_row("memory", "", f"{peak.memory_gb_s:g} GB/s", escape(peak.memory_source))
    return table


def _planned(request: Planned) -> PlanRequest:
    return PlanRequest(
        request.target,
        request.variant,
        request.preset,
        request.height,
        request.width,
        request.precision,
        skip=request.skip,
    )


def _conclusions(request: Planned, clip: ClipPrediction) -> Iterator[str]:
    """What the figures say, in sentences; the published ones where they can be compared."""
    bound = clip.compute_bound
    yield (
        f"Compute-bound in {bound:.0%} of the floor: there, more memory bandwidth changes nothing, and only fewer "
        "operations or a narrower format help."
    )
    figures = "; ".join(f"{entry.title} {entry.seconds} s, {entry.fps} FPS" for entry in PUBLISHED.values())
    yield f"Published by the authors (measured; 81 frames, 512x768, fp8, LightVAE): {figures}."
    published = PUBLISHED.get(request.target.name)
    if published is None or request.preset.name != PUBLISHED_PRESET:
        return
    if differences := ", ".join(_unlike_published(request, clip)):
        yield f"They are not compared with this floor, which is that of something else: {differences}."
        return
    short = clip.first(PUBLISHED_FRAMES)
    # A cache may keep what passes read; no cache helps a product.
    products = _GOAL * sum(short.part(kind).seconds for kind in KINDS if kind not in ELEMENT_WISE)
    share = products / published.seconds
    yield (
        f"The release runs at {short.seconds / published.seconds:.0%} of this floor. {_GOAL:g} times its speed "
        f"({published.seconds / _GOAL:.2f} s) would take {share:.0%} of the peak rates in {request.precision} for what "
        f"computes alone{', which no program reaches' if share > TOP else ''}."
    )


def _unlike_published(request: Planned, clip: ClipPrediction) -> Iterator[str]:
    """What keeps a plan from being compared with the authors' figures."""
    if (request.height, request.width) != PUBLISHED_SIZE:
        yield f"{request.height}x{request.width}"
    if request.precision != PUBLISHED_PRECISION:
        yield request.precision
    if request.variant.sparsity != (usual := load_variant(PUBLISHED_VARIANT)).sparsity:
        yield f"another sparsity than that of {usual.name}"
    elif request.variant.cache != usual.cache:
        yield f"another cache than that of {usual.name}"
    if request.preset.vae != LIGHT_VAE:
        yield "another decoder"
    if clip.frames < PUBLISHED_FRAMES:
        yield f"{len(clip.chunks)} chunks"
    if request.variant.schedule != usual.schedule:
        yield f"another schedule than that of {usual.name}"


TOP = 0.9
"""Share of the peak rates that real programs stay below."""


def plan_document(
    request: Planned, sessions: int, efficiency: Efficiency, built: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """The same as plain data."""
    clip = predict(request, built)
    prediction = None
    if clip is not None:
        prediction = {
            **clip.as_dict(),
            "built_bytes": dict(built or {}),
            "at_efficiency": {
                **asdict(efficiency),
                "seconds": efficiency.seconds(clip),
                "fps": efficiency.fps(clip),
            },
            "precisions": _documents(_precisions(request)),
            "decoders": _documents(_decoders(request)),
        }
    return {
        "target": request.target.name,
        "preset": request.preset.name,
        "variant": request.variant.name,
        "precision": request.precision,
        "skip": list(request.skip),
        "height": request.height,
        "width": request.width,
        "memory": plan_memory(request, sessions).as_dict(),
        "prediction": prediction,
        "published": {
            name: {"seconds": entry.seconds, "fps": entry.fps} for name, entry in PUBLISHED.items()
        },
    }


def _documents(entries: Iterable[tuple[str, PlanRequest]]) -> dict[str, Any]:
    clips = ((name, predict(request)) for name, request in entries)
    return {name: clip.as_dict() | {"chunks": None} for name, clip in clips if clip is not None}


def _table(title: str, *headings: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for index, heading in enumerate(headings):
        text = index == 0 or not heading
        table.add_column(heading, justify="left" if text else "right", overflow="fold")
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"
