"""Progress of a build, shown as a bar with the time left."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from runtime.host_memory import memory

from .units import readable_size

__all__ = ["ProgressCallback", "StepCallback", "kept_interrupts", "no_steps", "progress_bars", "time_left"]

ProgressCallback = Callable[[str, float, float], None]
"""Called with what is worked on now, how much of the effort is done and how much there is."""

_BETWEEN_LINES = 15.0
"""Seconds between two lines of progress in a log."""

StepCallback = Callable[[str, int, int], None]
"""Called from inside a part with a phase of its work, the steps of the part that are done, and their number."""


def no_steps(phase: str, done: int, total: int) -> None:
    """The `StepCallback` of those whom nobody watches."""


def time_left(elapsed: float, done: float, total: float) -> str:
    """Estimate of the time left, from what the effort done so far took: "about 3 min left"; empty if unknown."""
    if done <= 0 or done >= total:
        return ""
    seconds = elapsed * (total - done) / done
    return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"


@contextmanager
def kept_interrupts() -> Iterator[Callable[[], None]]:
    """Keep a Ctrl-C that Python loses while the body runs; the result raises it again whenever it is called.

    What is raised in the callback of a weak reference is printed and dropped, and tracing a model runs many of them;
    other libraries turn it into an error of their own, which becomes a `KeyboardInterrupt` again. Where Ctrl-C is
    ignored, as in a job in the background, it stays so.

    Raises:
        KeyboardInterrupt: Ctrl-C came, and a library turned it into an error of its own.
    """
    lost = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal lost
        lost = True
        signal.default_int_handler(number, frame)

    def check() -> None:
        if lost:
            raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield check
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield check
    except Exception as error:
        if lost:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def memory_left() -> str:
    """Main memory that is free for the work: "5.2 GiB of memory free"; empty where the system does not tell."""
    available = memory().available
    return "" if available is None else f"{readable_size(available)} of memory free"


@contextmanager
def progress_bars(console: Console) -> Iterator[ProgressCallback]:
    """A bar on `console` while the body runs; call the result as the work goes on.

    Where nobody looks at a screen (a pipe, a log), a line now and then in place of the bar.

    Raises:
        KeyboardInterrupt: from the result, for a Ctrl-C that went unnoticed before.
    """
    with kept_interrupts() as check, _bar(console) if console.is_terminal else _lines(console) as update:
        started = time.monotonic()

        def show(part: str, done: float, total: float) -> None:
            check()
            update(part, done, total, time_left(time.monotonic() - started, done, total))

        yield show


_Update = Callable[[str, float, float, str], None]


@contextmanager
def _bar(console: Console) -> Iterator[_Update]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[free]}"),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task("starting", total=None, left="", free="")

        def update(part: str, done: float, total: float, left: str) -> None:
            bars.update(task, description=part, completed=done, total=total, left=left, free=memory_left())

        yield update


@contextmanager
def _lines(console: Console) -> Iterator[_Update]:
    last = time.monotonic()

    def update(part: str, done: float, total: float, left: str) -> None:
        nonlocal last
        if time.monotonic() - last < _BETWEEN_LINES:
            return
        last = time.monotonic()
        share = f"{done / total:.0%}" if total else ""
        console.print(
            ", ".join(filter(None, (part, share, left, memory_left()))), markup=False, soft_wrap=True
        )

    yield update
