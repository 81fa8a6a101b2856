from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from runtime.terminal import (
    OutputError,
    TerminatedError,
    command_line,
    console,
    exit_code,
    printable,
    write_out,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a fox", "a fox"),
        ("视频 é\tx\ny", "视频 é\tx\ny"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("over\rwritten\x08\x7f", r"over\rwritten\x08\x7f"),
        ("\x9b31m", r"\x9b31m"),
        ("\0", r"\x00"),
    ],
)
def test_control_characters_are_written_out(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_what_is_printed_holds_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("name", title="\x1b[2Jtitle", caption="\x1b[5mcaption")
    table.add_row("\x1b]52;c;AAAA\x07")
    shown = console()
    shown.print(table)
    shown.print("\x1b[31mred\x9b0m", markup=False)
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x9b" not in out and "\x07" not in out
    for text in (r"\x1b[2Jtitle", r"\x1b[5mcaption", r"\x1b]52;c;AAAA\x07", r"\x1b[31mred\x9b0m"):
        assert text in out


def test_tables_in_pipes_are_as_wide_as_what_they_hold(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    table = Table(*("name " + "x" * 40, "name " + "y" * 40, "name " + "z" * 40))
    table.add_row("a" * 90, "b", "c")
    console().print(table)
    wide = capsys.readouterr().out
    assert "a" * 90 in wide and max(map(len, wide.splitlines())) < 250
    monkeypatch.setenv("COLUMNS", "60")
    console().print(table)
    assert max(map(len, capsys.readouterr().out.splitlines())) == 60


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_output_that_cannot_be_written_is_told_from_other_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Full())
    for attempt in (lambda: console().print("x"), lambda: write_out("x")):
        with pytest.raises(OutputError, match="No space left"):
            attempt()
    monkeypatch.setattr(sys, "stderr", Full())
    console(stderr=True).print("nobody can read this")


def test_what_an_encoding_lacks_is_escaped() -> None:
    code = "from runtime.terminal import *\nwith command_line(): console().print('视频 ok')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True
    )
    assert result.stdout.strip() == rb"\u89c6\u9891 ok"


def test_a_reader_that_goes_leaves_one_error_and_no_second_at_exit() -> None:
    code = (
        "import sys, time\n"
        "from runtime.terminal import *\n"
        "sys.stdin.readline()\n"
        "try:\n"
        "    with command_line(): write_out('x')\n"
        "except OutputError as error:\n"
        "    sys.exit(7)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdin is not None and process.stderr is not None
        process.stdout.close()
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.wait(timeout=60) == 7
        assert process.stderr.read() == ""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_sigterm_becomes_an_exception_and_the_handler_goes() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TerminatedError) as ended, command_line():
        signal.raise_signal(signal.SIGTERM)
    assert exit_code(ended.value) == 143 and exit_code(KeyboardInterrupt()) == 130
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_build_that_keeps_interrupts_hears_of_sigterm() -> None:
    from export.progress import kept_interrupts

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), command_line(), kept_interrupts() as check:
            with contextlib.suppress(TerminatedError):  # as a callback of a weak reference loses it
                signal.raise_signal(signal.SIGTERM)
            check()
    finally:
        signal.signal(signal.SIGINT, before)
