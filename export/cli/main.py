"""Command line of the export tools: arguments, validation at the door, dispatch. `python -m export --help`.

Exit codes: 0 done, 1 a comparison or check failed or something was not foreseen, 2 bad input, 130 interrupted, 143
terminated. An error is one line on stderr; `--debug` shows the traceback. Nothing heavy is imported before the
arguments are known to be good.
"""

from __future__ import annotations

import argparse
import inspect
import shlex
import sys
from collections.abc import Sequence
from pathlib import PurePath

from runtime.terminal import BAD_INPUT, run_command, say

from .attention_map import AttentionMap
from .build import Build
from .calibrate import Calibrate
from .command import Command, CommandParser
from .compare import Compare
from .doctor import Doctor
from .hub import Models, Pull, Push
from .inspection import Inspect
from .onnx import Onnx
from .plan import Plan
from .sign import Sign
from .targets import Targets

__all__ = ["COMMANDS", "main"]

COMMANDS: tuple[Command, ...] = (
    Plan(),
    Build(),
    Onnx(),
    Calibrate(),
    Inspect(),
    Compare(),
    AttentionMap(),
    Sign(),
    Models(),
    Push(),
    Pull(),
    Targets(),
    Doctor(),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)

    def work() -> int:
        args = _parser().parse_args(arguments)
        args.command_line = shlex.join(["python", "-m", "export", *map(_portable, arguments)])
        command: Command = args.command
        return command.run(args)

    return run_command(
        work,
        say,
        expected=_expected,
        install="pip install '.[cpu,text,video,export]'",
        debug="--debug" in arguments,
    )


def _portable(argument: str) -> str:
    """An argument as a manifest may hold it: absolute paths, which say where on whose machine, as names alone."""
    option, equals, value = argument.rpartition("=")
    return f"{option}{equals}{PurePath(value).name}" if PurePath(value).is_absolute() else argument


def _expected(error: Exception) -> int | None:
    from export.errors import ExportError
    from lightforcing_ref.errors import LightForcingError as ReferenceError_
    from runtime.errors import LightForcingError as RuntimeError_

    return BAD_INPUT if isinstance(error, ExportError | ReferenceError_ | RuntimeError_ | OSError) else None


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m export", description="Checkpoint -> ONNX -> engines -> bundle.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        doc = inspect.getdoc(type(command)) or ""
        sub = commands.add_parser(
            command.name,
            help=doc.splitlines()[0].rstrip("."),
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(sub)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(command=command)
    return parser
