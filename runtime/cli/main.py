"""Command line: ``python -m runtime generate``, ``bench`` and ``verify``.

Exit codes: 0 done, 2 bad input (nothing is written), 1 failed while running, 130 interrupted.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence

from runtime.errors import EngineError, LightForcingError, SessionFailedError

__all__ = ["build_parser", "main"]

_FAILED, _BAD_INPUT, _INTERRUPTED = 1, 2, 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(prog="python -m runtime", description="Run bundles.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="generate a clip from a prompt")
    _add_rollout_arguments(generate)
    generate.add_argument("--seconds", type=float, default=5.0, help="length, rounded up to whole chunks (5)")
    generate.add_argument(
        "--out", required=True, metavar="FILE", help="video file to write (.mp4, .mov, .mkv)"
    )
    generate.add_argument("--contact-sheet", metavar="FILE", help="also write a PNG with frames of the clip")
    generate.add_argument(
        "--switch",
        action="append",
        default=[],
        metavar="'CHUNK: PROMPT'",
        help="change the prompt from that chunk on; may be given several times",
    )
    generate.add_argument(
        "--recache",
        choices=("window", "all", "none"),
        default="window",
        help="cached frames recomputed at a switch: all but the sinks, all, or none (window)",
    )

    bench = commands.add_parser("bench", help="measure frames per second and where the time goes")
    _add_rollout_arguments(bench)
    bench.add_argument("--chunks", type=int, default=14, help="chunks to measure per session (14)")
    bench.add_argument("--warmup-chunks", type=int, default=2, help="chunks to run before measuring (2)")
    bench.add_argument("--sessions", type=int, default=1, help="sessions to run at once (1)")
    bench.add_argument("--json", metavar="FILE", help="write the result as JSON; '-' for standard output")

    verify = commands.add_parser("verify", help="check that every component computes what it should here")
    verify.add_argument("bundle", help="folder of the bundle")
    verify.add_argument(
        "--dry-run",
        action="store_true",
        help="execute nothing: check every launch of a GPU bundle on any machine",
    )
    verify.add_argument("--json", metavar="FILE", help="write the result as JSON; '-' for standard output")
    verify.add_argument("--threads", type=int, help="CPU threads (OMP_NUM_THREADS, else all cores)")
    return parser


def _add_rollout_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="folder of the bundle")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", help="text prompt (empty)")
    prompt.add_argument("--embedding", metavar="FILE", help="prompt embedding, a .npy file [text_len, dim]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (0)")
    parser.add_argument(
        "--threads", type=int, help="CPU threads per forward (OMP_NUM_THREADS, else all cores)"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    options = build_parser().parse_args(arguments)

    from rich.console import Console

    console = Console(stderr=True)

    def show(message: Warning | str, *_: object, **__: object) -> None:
        console.print(f"warning: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True)

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        try:
            if options.command == "generate":
                from .generate import run_generate

                run_generate(options, console)
            elif options.command == "bench":
                from .bench import run_bench

                run_bench(options, console)
            else:
                from .verify import run_verify

                run_verify(options, console)
        except KeyboardInterrupt:
            console.print("interrupted; nothing was written", style="red")
            return _INTERRUPTED
        except LightForcingError as error:
            console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            return _FAILED if isinstance(error, (EngineError, SessionFailedError)) else _BAD_INPUT
        except OSError as error:
            console.print(f"error: {error}; nothing was written", style="red", markup=False, soft_wrap=True)
            return _FAILED
    return 0
