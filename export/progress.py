"""Progress of a build, shown as a bar per component."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

__all__ = ["ProgressCallback", "progress_bars"]

ProgressCallback = Callable[[str, int, int], None]
"""Called with what is worked on now, how many parts are done and how many there are."""


@contextmanager
def progress_bars(console: Console) -> Iterator[ProgressCallback]:
    """A bar on `console` while the body runs; call the result as the work goes on."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task("starting", total=None)

        def show(part: str, done: int, total: int) -> None:
            bars.update(task, description=part, completed=done, total=total)

        yield show
