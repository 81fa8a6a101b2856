"""What the commands print about targets and variants."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from export.request.targets import Target, Variant

from .tables import titled_table

__all__ = ["target_table", "variant_table"]


def target_table(targets: Iterable[Target]) -> Table:
    """One line per target."""
    table = titled_table("Targets", "name", "GPU", "arch", "GiB", "block", "TFLOPS", "GB/s", "precisions")
    table.caption = "block in tokens; dense TFLOPS bf16/fp8/fp4 and GB/s as published"
    for target in targets:
        blocks, peak = target.blocks, target.peak
        rates = (peak.bf16_tflops, peak.fp8_tflops, peak.fp4_tflops) if peak else ()
        table.add_row(
            target.name,
            target.title,
            target.sm or "-",
            f"{target.memory_gib:g}" if target.memory_gib else "-",
            str(blocks.key) if blocks else "any",
            "/".join(f"{rate:.0f}" for rate in rates if rate) or "-",
            f"{peak.memory_gb_s:.0f}" if peak else "-",
            " ".join(target.precisions),
        )
    return table


def variant_table(variants: Iterable[Variant]) -> Table:
    """One line per variant."""
    table = titled_table("Variants", "name", "sparsity", "planned", "keep", "window", "sinks", "block", "for")
    table.caption = "sparsity average/limit; latent frames; keep: in all/first/latest"
    for variant in variants:
        sparsity, cache = variant.sparsity, variant.cache
        keep = "all" if sparsity.keep_frames is None else sparsity.keep_frames
        table.add_row(
            variant.name,
            f"{sparsity.target:.2f}/{sparsity.base:.2f}" if sparsity.target else "dense",
            str(sparsity.table_frames),
            f"{keep}/{sparsity.sink_frames}/{sparsity.near_frames}",
            str(variant.window_frames),
            f"{cache.sink_frames} {cache.sink_positions}",
            str(variant.block or "any"),
            variant.title,
        )
    return table
