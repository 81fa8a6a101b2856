"""Command line: `python -m runtime generate`, `bench` and `verify`.

Exit codes: 0 done, 2 bad input (nothing is written), 1 failed while running, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from runtime.errors import EngineError, LightForcingError, SessionFailedError
from runtime.terminal import BAD_INPUT, FAILED, console, run_command

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["build_parser", "main"]


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
    generate.add_argument(
        "--start", metavar="FILE", help="go on from this image or video (a bundle built --with-encoder)"
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
        "--noise-file",
        metavar="FILE",
        help="noise in place of the seed's: a .npy file [chunks, steps, channels, latent frames, h, w]",
    )
    generate.add_argument(
        "--latents",
        metavar="FILE",
        help="also write the latents: a .npy file [channels, latent frames, h, w]",
    )
    generate.add_argument(
        "--recache",
        choices=("window", "all", "none", "joint", "flush", "cut"),
        help="cached frames at a switch: recompute all but the sinks, all, or none, or all in one forward; forget "
        "them; or cut the scene (what the bundle says)",
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
    _add_pin(verify)
    verify.add_argument(
        "--public-key", metavar="FILE", help="refuse the bundle if this key's owner has not signed it"
    )
    verify.add_argument("--signature", metavar="FILE", help="the signature (model.sig in the bundle)")
    verify.add_argument("--json", metavar="FILE", help="write the result as JSON; '-' for standard output")
    verify.add_argument("--threads", type=int, help="CPU threads (OMP_NUM_THREADS, else all cores)")
    for command in (generate, bench, verify):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
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
    checks = parser.add_mutually_exclusive_group()
    _add_pin(checks)
    checks.add_argument("--no-verify", action="store_true", help="leave the hashes of the bundle's files out")
    parser.add_argument(
        "--no-golden", action="store_true", help="leave the golden vectors out that a new GPU is checked with"
    )


def _add_pin(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--expect", metavar="SHA256", help="refuse the bundle if its manifest has another SHA-256"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    options = build_parser().parse_args(arguments)
    notes, written = console(stderr=True), list[str]()

    def say(message: str, style: str = "red") -> None:
        notes.print(message, style=style, markup=False, highlight=False, soft_wrap=True)

    def show(message: Warning | str, *_: object, **__: object) -> None:
        say(f"warning: {message}", "yellow")

    def work() -> int:
        _run(options, notes, written)
        return 0

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        return run_command(
            work,
            say,
            expected=_expected,
            install="pip install '.[cpu,text,video]', or gpu in place of cpu",
            debug=options.debug,
            left=lambda: _left(written),
        )


def _expected(error: Exception) -> int | None:
    if not isinstance(error, LightForcingError):
        return None
    return FAILED if isinstance(error, (EngineError, SessionFailedError)) else BAD_INPUT


def _run(options: argparse.Namespace, notes: Console, written: list[str]) -> None:
    """Run the command that was asked for; what it has completed goes into `written`."""
    if options.command == "generate":
        from .generate import run_generate

        run_generate(options, notes, written)
    elif options.command == "bench":
        from .bench import run_bench

        run_bench(options, notes, written)
    else:
        from .verify import run_verify

        run_verify(options, notes, written)


def _left(written: Sequence[str]) -> str:
    return (
        f"{' and '.join(written)} {'was' if len(written) == 1 else 'were'} written"
        if written
        else "nothing was written"
    )
