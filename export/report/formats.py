"""What a search for formats found: the frontier of time against error, and where the choice lies on it."""

from __future__ import annotations

from rich import box
from rich.table import Table

from runtime.bundle import FormatSearch

__all__ = ["search_table"]


def search_table(search: FormatSearch) -> Table:
    """The frontier, one line a point, the slowest first."""
    table = Table(
        title="Formats of the linears: time against error (predicted)",
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("linears, ms a clip", "output error", ""):
        table.add_column(heading, justify="right")
    for seconds, error in search.frontier:
        is_chosen = (seconds, error) == (search.seconds, search.error)
        table.add_row(
            f"{seconds * 1e3:.4g}",
            f"{error:.4f}",
            f"within {search.budget:g}" if is_chosen else "",
            style="bold" if is_chosen else None,
        )
    table.caption = (
        "at the published peak rates; error: of what one forward predicts, from measurements of single kinds of "
        "linears"
    )
    return table
