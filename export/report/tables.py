"""The look of the tables."""

from __future__ import annotations

from rich import box
from rich.table import Table

__all__ = ["titled_table"]


def titled_table(title: str, first: str, *headings: str) -> Table:
    """An empty table; the first column does not wrap."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
