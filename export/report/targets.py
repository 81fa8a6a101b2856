"""What the commands print about targets, variants and this machine."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.markup import escape
from rich.table import Table

from export.request.targets import Target, Variant
from export.units import readable_size

from .doctor import Report

__all__ = ["doctor_tables", "target_table", "variant_table"]

_YES = "[green]yes[/]"


def target_table(targets: Iterable[Target]) -> Table:
    """One line per target."""
    table = _table("Targets", "name", "GPU", "arch", "GiB", "block", "TFLOPS", "GB/s", "precisions")
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
    table = _table("Variants", "name", "sparsity", "planned", "keep", "window", "sinks", "block", "for")
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


def doctor_tables(report: Report) -> tuple[Table | str, ...]:
    """The report of `doctor`: machine, libraries, backends, and what is broken."""
    machine = _table("Machine", "", "")
    machine.show_header = False
    machine.add_row("Python", report.python)
    machine.add_row("system", report.system)
    machine.add_row("memory", f"{_known(report.memory.available)} available of {_known(report.memory.total)}")
    machine.add_row("disk", f"{_known(report.disk_free)} free at {escape(report.disk_folder)}")
    for gpu in report.gpus.gpus:
        machine.add_row(
            "GPU", f"{gpu.name}, compute capability {gpu.compute_capability}, {_known(gpu.memory_bytes)}"
        )
    machine.add_row("CUDA", report.gpus.problem or f"driver supports up to {report.gpus.cuda_version}")

    libraries = _table("Libraries", "library", "installed", "loaded", "")
    for library in report.libraries:
        verdict = f"[red]{escape(library.problem)}[/]" if library.problem else "[green]ok[/]"
        libraries.add_row(library.name, library.installed, library.loaded or "-", verdict)

    backends = _table("Backends", "backend", "build here", "run here")
    for status in report.backends:
        backends.add_row(status.name, status.build or _YES, status.run or _YES)

    verdicts = [f"[red]problem:[/] {escape(problem)}" for problem in report.problems]
    return machine, libraries, backends, *(verdicts or ["[green]no problems found[/]"])


def _table(title: str, first: str, *headings: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _known(size: int | None) -> str:
    return "unknown" if size is None else readable_size(size)
