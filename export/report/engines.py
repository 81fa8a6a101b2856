"""What a build took, as a table."""

from __future__ import annotations

from rich import box
from rich.table import Table

from export.units import readable_size
from runtime.bundle import Manifest

__all__ = ["engine_table"]


def engine_table(manifest: Manifest) -> Table:
    """The engines of a bundle: products by type, launches, activation memory, size, and what building them took."""
    sizes = {entry.path: entry.bytes for entry in manifest.files}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("component", no_wrap=True)
    table.add_column("products", overflow="fold")
    for column in ("launches", "activations", "engine", "build", "memory"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, component in manifest.components.items():
        if component.file is None or component.cost is None:
            continue
        cost = component.cost
        table.add_row(
            name,
            ", ".join(f"{count} {kind}" for kind, count in sorted(cost.gemms.items())) or "none",
            str(cost.launches),
            readable_size(cost.activation_bytes),
            readable_size(sizes[component.file]),
            f"{cost.seconds:.1f} s",
            readable_size(cost.peak_bytes),
        )
    return table
