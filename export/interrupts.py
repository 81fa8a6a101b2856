"""Interruptions by Ctrl-C that are not lost."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["kept_interrupts"]


@contextmanager
def kept_interrupts() -> Iterator[Callable[[], None]]:
    """Keep a Ctrl-C that Python loses while the body runs; the result raises it again whenever it is called.

    What is raised in the callback of a weak reference is printed and dropped, and tracing a model runs many of them;
    other libraries turn it into an error of their own, which becomes a `KeyboardInterrupt` again. Where Ctrl-C is
    ignored, as in a job in the background, it stays so.
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
