"""Command line of the export tools: arguments, validation at the door, dispatch. `python -m export --help`.

Exit codes: 0 done, 1 a comparison or check failed, 2 bad input (one line on stderr; `--debug` shows the traceback),
130 interrupted. Nothing heavy is imported before the arguments are known to be good.
"""

from __future__ import annotations

import argparse
import inspect
import shlex
import sys
from collections.abc import Sequence

from .build import Build
from .calibrate import Calibrate
from .command import Command, CommandParser
from .compare import Compare
from .doctor import Doctor
from .hub import Models
from .inspection import Inspect
from .onnx import Onnx
from .plan import Plan
from .targets import Targets

__all__ = ["COMMANDS", "main"]

COMMANDS: tuple[Command, ...] = (
    Plan(),
    Build(),
    Onnx(),
    Calibrate(),
    Inspect(),
    Compare(),
    Models(),
    Targets(),
    Doctor(),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        args = _parser().parse_args(arguments)
        args.command_line = shlex.join(["python", "-m", "export", *arguments])
        command: Command = args.command
        return command.run(args)
    except KeyboardInterrupt:
        print("interrupted; a build resumes when the same command runs again", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if "--debug" in arguments:
            raise
        print(
            f"error: {error}; install the export tools: pip install '.[cpu,text,video,export]'",
            file=sys.stderr,
        )
        return 2
    except Exception as error:
        if "--debug" in arguments or not isinstance(error, _expected()):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _expected() -> tuple[type[Exception], ...]:
    from export.errors import ExportError
    from lightforcing_ref.errors import LightForcingError as ReferenceError_
    from runtime.errors import LightForcingError as RuntimeError_

    return ExportError, ReferenceError_, RuntimeError_, OSError


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
