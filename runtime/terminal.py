"""What the command lines share: output that any terminal, pipe or file takes, and ends by signal that clean up.

Rich is imported when a console is made, so that `--help` does without it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from .files import MORE_FILES, allow_open_files

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "BAD_INPUT",
    "FAILED",
    "OutputError",
    "TerminatedError",
    "command_line",
    "console",
    "exit_code",
    "printable",
    "run_command",
    "say",
    "write_out",
]

FAILED, BAD_INPUT = 1, 2
"""Exit codes of commands that did not do what they were asked for, beside those of signals."""

_PIPED_WIDTH = 10_000
"""Columns where nobody looks at a screen: tables are as wide as what they hold, and no cell is cut."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters but for tabs and line ends: terminals obey them."""


class OutputError(Exception):
    """Standard output cannot be written: the disk is full, or whoever read it has gone."""


class TerminatedError(KeyboardInterrupt):
    """SIGTERM. Whatever cleans up after Ctrl-C does so now."""


def printable(text: str) -> str:
    """`text` with control characters written out, so that a name or a prompt cannot steer the terminal."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


class _Stream:
    """A standard stream whose errors are told from all others, or, on standard error, do not count."""

    def __init__(self, stream: Any, *, counts: bool) -> None:
        self._stream, self._counts = stream, counts

    def write(self, text: str) -> int:
        with _told(counts=self._counts):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with _told(counts=self._counts):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _told(*, counts: bool) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: the stream is closed
        if counts:
            raise OutputError(str(error)) from error


def console(*, stderr: bool = False) -> Console:
    """A console on standard output, or on standard error.

    What the stream's encoding lacks is written as an escape; control characters never reach it; where it is no
    terminal, nothing is wrapped or cut (`COLUMNS` gives another width).
    """
    from rich.console import Console, RenderableType
    from rich.segment import Segment
    from rich.text import Text

    class _Console(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(printable(text), **options)  # before a table measures it

        def render(self, renderable: RenderableType, options: Any = None) -> Iterable[Segment]:
            for text, style, control in super().render(renderable, options):
                yield Segment(text if control else printable(text), style, control)

    stream = sys.stderr if stderr else sys.stdout
    is_terminal = getattr(stream, "isatty", bool)()
    width = None if is_terminal or "COLUMNS" in os.environ else _PIPED_WIDTH
    return _Console(file=_Stream(stream, counts=not stderr), width=width)  # type: ignore[arg-type]


def write_out(text: str) -> None:
    """Write text, such as JSON, to standard output.

    Raises:
        OutputError: it cannot be written.
    """
    stream = _Stream(sys.stdout, counts=True)
    stream.write(text)
    stream.flush()


def say(line: str) -> None:
    """Tell people a line, on standard error."""
    print(printable(line), file=sys.stderr)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """What a shell expects of a process that a signal ended: 128 and the signal's number."""
    return 128 + (signal.SIGTERM if isinstance(interrupt, TerminatedError) else signal.SIGINT)


def run_command(
    work: Callable[[], int],
    say: Callable[[str], None],
    *,
    expected: Callable[[Exception], int | None],
    install: str,
    debug: bool = False,
    left: Callable[[], str] = str,
) -> int:
    """Run a command, and end it in one line whatever happens: the exit code.

    Args:
        work: the command; returns its exit code.
        say: tells people a line, such as the function of that name.
        expected: the exit code of an error whose message is meant for people; None of any other.
        install: what installs a module that is missing.
        debug: let errors through, with their traceback.
        left: what the command leaves behind where it is cut short, if anything is worth saying.
    """

    def end(message: str, code: int, error: BaseException, after: str = "") -> int:
        parts = [message, *getattr(error, "__notes__", ()), MORE_FILES if _out_of_files(error) else "", after]
        say("; ".join(" ".join(part.split()) for part in parts if part))
        return code

    try:
        with command_line():
            allow_open_files()
            return work()
    except KeyboardInterrupt as interrupt:
        word = "terminated" if isinstance(interrupt, TerminatedError) else "interrupted"
        return end(word, exit_code(interrupt), interrupt, left())
    except Exception as error:
        if debug:
            raise
        if (code := expected(error)) is not None:
            return end(f"error: {error}", code, error)
        if isinstance(error, OutputError):
            return end(f"error: standard output cannot be written ({error})", FAILED, error, left())
        if isinstance(error, ModuleNotFoundError):
            return end(f"error: {error}; install it: {install}", BAD_INPUT, error)
        if isinstance(error, OSError | MemoryError):
            return end(f"error: {error or 'not enough memory'}", FAILED, error, left())
        unforeseen = "This was not foreseen: please report it, with what --debug adds"
        return end(
            f"error: {type(error).__name__}: {error}", FAILED, error, f"{left()}. {unforeseen}".lstrip(". ")
        )


def _out_of_files(error: BaseException | None) -> bool:
    """Whether an error, a library's too, comes from having as many files open as this process may."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.ENFILE:
            return True
        if os.strerror(errno.EMFILE) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def command_line() -> Iterator[None]:
    """Around all that a command does: prepares the streams, and turns SIGTERM into `TerminatedError`.

    Raises:
        OutputError: at the end, standard output does not take what is left.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    before = _handle_termination()
    try:
        yield
        write_out("")
    except OutputError:
        _abandon_output()
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _handle_termination() -> Any:
    """Install the handler; returns the one before, None where signals are handled elsewhere or not in this thread."""

    def end(number: int, frame: FrameType | None) -> None:
        interrupted = signal.getsignal(signal.SIGINT)
        if callable(interrupted) and interrupted is not signal.default_int_handler:
            with contextlib.suppress(KeyboardInterrupt):
                interrupted(signal.SIGINT, frame)  # takes note, for where an exception gets lost
        raise TerminatedError

    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return None
    try:
        return signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread
        return None


def _abandon_output() -> None:
    """Let the interpreter's last flush succeed, which would print a second error otherwise."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
