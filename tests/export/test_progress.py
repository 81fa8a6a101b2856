"""The progress bar of a build: time left, and Ctrl-C."""

from __future__ import annotations

import io
import re
import signal
import weakref
from types import SimpleNamespace

import pytest
from rich.console import Console

from export.progress import kept_interrupts, progress_bars, time_left


class Node:
    """Something that a weak reference can point to."""


def lose_an_interruption() -> None:
    """A Ctrl-C in the callback of a weak reference, from where Python lets no exception out."""
    node = Node()
    reference = weakref.ref(node, lambda _: signal.raise_signal(signal.SIGINT))
    del node
    assert reference() is None


def test_time_and_memory_that_are_left_are_shown() -> None:
    shown = io.StringIO()
    with progress_bars(Console(file=shown, force_terminal=True, width=140)) as progress:
        progress("one", 1, 4)
    assert "one" in shown.getvalue()
    assert re.search(r"[\d.]+ GiB of memory free", shown.getvalue())


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(0, 1000, 4))  # a look at the clock takes four
    monkeypatch.setattr("export.progress.time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    log = io.StringIO()
    with progress_bars(Console(file=log, width=140)) as progress:
        for done in range(12):
            progress(f"part [{done}]", done, 12)
    lines = log.getvalue().splitlines()
    assert 3 <= len(lines) <= 7
    for line in lines:
        assert re.fullmatch(r"part \[\d+\], \d+%, about \d+ (s|min) left, [\d.]+ GiB of memory free", line)
    assert "\x1b" not in log.getvalue()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_lost_interruption_ends_the_work_at_its_next_step() -> None:
    with progress_bars(Console(file=io.StringIO())) as progress:
        progress("one", 0, 2)
        lose_an_interruption()
        with pytest.raises(KeyboardInterrupt):
            progress("two", 1, 2)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interruption_is_raised_where_it_arrives() -> None:
    with pytest.raises(KeyboardInterrupt), kept_interrupts() as check:
        check()
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not interrupted")


def test_an_interruption_that_a_library_turned_into_its_own_error_is_one_again() -> None:
    """As safetensors does while it makes a tensor."""
    with pytest.raises(KeyboardInterrupt) as raised, kept_interrupts():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None
    assert isinstance(raised.value.__cause__, ValueError)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(ValueError, match="broken"), kept_interrupts():
        raise ValueError("broken")


def test_where_interruptions_are_ignored_they_stay_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with kept_interrupts() as check:
            signal.raise_signal(signal.SIGINT)
            check()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_time_left_follows_from_the_effort_so_far() -> None:
    assert time_left(20, 10, 40) == "about 60 s left"
    assert time_left(60, 10, 40) == "about 3 min left"
    assert time_left(5, 0, 40) == time_left(5, 40, 40) == ""
