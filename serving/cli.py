"""``python -m serving``: arguments, exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .settings import Settings

__all__ = ["build_parser", "main"]

_FAILED, _BAD_INPUT = 1, 2


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m serving", description="Serve a bundle.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="a page, a live stream and an API for clips, on one device")
    run.add_argument("bundle", type=Path, help="folder of the bundle")
    run.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)"
    )
    run.add_argument("--port", type=int, default=8000, help="port; 0 for any that is free (8000)")
    run.add_argument("--sessions", type=int, default=2, help="sessions at a time; others wait (2)")
    run.add_argument("--threads", type=int, help="CPU threads per forward (OMP_NUM_THREADS, else all cores)")
    run.add_argument(
        "--token-file", metavar="FILE", help="bearer token that clients need; needed beyond loopback"
    )
    run.add_argument("--insecure", action="store_true", help="listen beyond loopback without a token")
    run.add_argument("--origin", action="append", default=[], help="further origin whose pages may connect")
    run.add_argument("--allow-host", action="append", default=[], help="further name of this server")
    run.add_argument(
        "--videos", type=Path, metavar="FOLDER", help="where clips are kept (the user's state folder)"
    )
    run.add_argument(
        "--drain", type=float, default=30.0, metavar="SECONDS", help="time to end, when stopped (30)"
    )
    run.add_argument("--queue", type=int, default=16, help="clients that may wait for a place (16)")
    run.add_argument("--rate", type=float, default=20.0, help="requests a second from one client (20)")
    run.add_argument(
        "--example", action="append", default=[], metavar="PROMPT", help="prompt that the page offers"
    )
    run.add_argument("--resident-text-encoder", action="store_true", help="keep its weights in memory")
    run.add_argument("--no-verify", action="store_true", help="leave hashes and golden vectors out")
    run.add_argument("--log-prompts", action="store_true", help="write prompts to the log in full")
    run.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0 stopped, 1 the bundle could not be loaded, 2 bad input."""
    options = build_parser().parse_args(arguments)

    from .errors import SettingsError
    from .logs import configure

    try:
        settings = _settings(options)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return _BAD_INPUT
    configure(options.log_level)
    from runtime import BundleError, InputError

    from .server import serve

    failure = serve(settings, lambda url: print(f"open {url} (Ctrl+C stops)", flush=True))
    if failure is None:
        return 0
    print(f"error: {failure}", file=sys.stderr)
    return _BAD_INPUT if isinstance(failure, (BundleError, InputError)) else _FAILED


def _settings(options: argparse.Namespace) -> Settings:
    from .settings import Limits, Settings, default_videos_folder, read_token

    return Settings(
        bundle=options.bundle,
        host=options.host,
        port=options.port,
        sessions=options.sessions,
        threads=options.threads,
        token=None if options.token_file is None else read_token(options.token_file),
        insecure=options.insecure,
        origins=tuple(options.origin),
        hosts=tuple(options.allow_host),
        videos=options.videos or default_videos_folder(),
        drain_seconds=options.drain,
        log_prompts=options.log_prompts,
        examples=tuple(options.example),
        resident_text_encoder=options.resident_text_encoder,
        verify=not options.no_verify,
        limits=Limits(
            queue=options.queue,
            requests_per_second=options.rate,
            request_burst=max(1, round(4 * options.rate)),
        ),
    )
