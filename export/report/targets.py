"""What the commands print about targets and variants."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from export.request.targets import Operands, Target, Variant

from .tables import titled_table

__all__ = ["target_table", "variant_table"]

_SHOWN: tuple[Operands, ...] = ("bf16", "fp8", "mxfp8", "nvfp4")


def target_table(targets: Iterable[Target]) -> Table:
    """One line per target."""
    table = titled_table("Targets", "name", "GPU", "arch", "GiB", "block", "TFLOPS", "GB/s", "precisions")
    table.caption = (
        f"block in tokens; dense TFLOPS {'/'.join(_SHOWN)} with fp32 sums, GB/s; sources: --json, or plan"
    )
    for target in targets:
        blocks, peak = target.blocks, target.peak
        rates = [peak.tflops(kind) for kind in _SHOWN] if peak else []
        table.add_row(
            target.name,
            target.title,
            target.sm or "-",
            f"{target.memory_gib:g}" if target.memory_gib else "-",
            str(blocks.key) if blocks else "any",
            "/".join(f"{rate:.0f}" if rate else "-" for rate in rates) or "-",
            f"{peak.memory_gb_s:.0f}" if peak else "-",
            " ".join(target.precisions),
        )
    return table


def variant_table(variants: Iterable[Variant]) -> Table:
    """One line per variant."""
    table = titled_table(
        "Variants", "name", "sparsity", "planned", "keep", "window", "sinks", "block", "steps", "for"
    )
    table.caption = (
        "sparsity average/limit; latent frames; keep: all/first/latest; steps (of the first chunk) x frames"
    )
    for variant in variants:
        sparsity, cache = variant.sparsity, variant.cache
        keep = "all" if sparsity.keep_frames is None else sparsity.keep_frames
        table.add_row(
            variant.name,
            _sparsity(variant),
            str(sparsity.table_frames),
            f"{keep}/{sparsity.sink_frames}/{sparsity.near_frames}",
            str(variant.window_frames),
            f"{cache.sink_frames} {cache.sink_positions}",
            str(variant.block or "any"),
            _steps(variant),
            variant.title,
        )
    return table


def _sparsity(variant: Variant) -> str:
    """The budget, or the method where it is another than hierarchical selection."""
    if variant.is_dense:
        return "dense"
    if variant.attention.policy != "hsa":
        return variant.attention.policy
    return f"{variant.sparsity.target:.2f}/{variant.sparsity.base:.2f}"


def _steps(variant: Variant) -> str:
    schedule = variant.schedule
    first = f" ({len(schedule.first_steps)})" if schedule.first_steps else ""
    return f"{len(schedule.steps)}{first} x {schedule.chunk_frames}"
