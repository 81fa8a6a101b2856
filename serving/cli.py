"""`python -m serving`: arguments, exit codes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.files import LEAST_FILES, allow_open_files
from runtime.terminal import BAD_INPUT, FAILED, run_command, say, write_out

if TYPE_CHECKING:
    from .settings import Settings

__all__ = ["build_parser", "main"]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m serving", description="Serve a bundle.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="a page, a live stream and an API for clips, on one device")
    _add_server_arguments(run)
    cluster = commands.add_parser(
        "ray", help="a server on each of many devices, behind one address (Ray Serve)"
    )
    _add_server_arguments(cluster)
    cluster.add_argument("--replicas", type=int, default=1, help="servers, each with its own device (1)")
    cluster.add_argument("--cpus", type=float, default=1.0, help="CPUs that each replica reserves (1)")
    cluster.add_argument("--gpus", type=float, default=0.0, help="GPUs that each replica reserves (0)")
    cluster.add_argument(
        "--address",
        help="a Ray cluster that runs already ('auto' finds this machine's): deploy there, or replace what is "
        "deployed, and return; otherwise one is started here and ends with this command",
    )
    return parser


def _add_server_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="folder of the bundle")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="port; 0 for any that is free (8000)")
    parser.add_argument("--sessions", type=int, default=2, help="sessions at a time; others wait (2)")
    parser.add_argument(
        "--threads", type=int, help="CPU threads per forward (OMP_NUM_THREADS, else all cores)"
    )
    parser.add_argument(
        "--token-file", metavar="FILE", help="bearer token that clients need; needed beyond loopback"
    )
    parser.add_argument("--insecure", action="store_true", help="listen beyond loopback without a token")
    parser.add_argument(
        "--origin", action="append", default=[], help="further origin whose pages may connect"
    )
    parser.add_argument("--allow-host", action="append", default=[], help="further name of this server")
    parser.add_argument(
        "--videos", type=Path, metavar="FOLDER", help="where clips are kept (the user's state folder)"
    )
    parser.add_argument(
        "--drain", type=float, default=30.0, metavar="SECONDS", help="time to end, when stopped (30)"
    )
    parser.add_argument("--queue", type=int, default=16, help="clients that may wait for a place (16)")
    parser.add_argument("--connections", type=int, default=8, help="connections from one address (8)")
    parser.add_argument("--ice-server", action="append", default=[], help="STUN or TURN server for WebRTC")
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second from one client (20)")
    parser.add_argument(
        "--example", action="append", default=[], metavar="PROMPT", help="prompt that the page offers"
    )
    parser.add_argument(
        "--resident-text-encoder",
        action="store_true",
        help="keep its weights in memory, even where they take more than half of what is free",
    )
    checks = parser.add_mutually_exclusive_group()
    checks.add_argument(
        "--expect", metavar="SHA256", help="refuse the bundle if its manifest has another SHA-256"
    )
    checks.add_argument("--no-verify", action="store_true", help="leave the hashes of the bundle's files out")
    parser.add_argument(
        "--no-golden", action="store_true", help="leave the golden vectors out that a new GPU is checked with"
    )
    parser.add_argument("--log-prompts", action="store_true", help="write prompts to the log in full")
    parser.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0 stopped, 1 the bundle could not be loaded, 2 bad input, else a signal's."""
    options = build_parser().parse_args(arguments)
    return run_command(
        lambda: _serve(options),
        say,
        expected=_expected,
        install="pip install '.[cpu,text,video,serve]', or gpu in place of cpu; webrtc and ray are extras of their own",
        debug=options.debug,
    )


def _expected(error: Exception) -> int | None:
    from runtime import BundleError, InputError, LightForcingError

    from .errors import ClusterError, ServingError

    if isinstance(error, (BundleError, InputError)):
        return BAD_INPUT
    if isinstance(error, (ClusterError, LightForcingError)):
        return FAILED
    return BAD_INPUT if isinstance(error, ServingError) else None


def _serve(options: argparse.Namespace) -> int:
    from .logs import configure

    settings = _settings(options)
    allow_open_files(LEAST_FILES + settings.sessions + settings.limits.queue)
    configure(options.log_level)
    if options.command == "ray":
        _serve_cluster(options, settings)
        return 0
    from .server import serve

    failure = serve(settings, lambda url: write_out(f"open {url} (Ctrl+C stops)\n"))
    if failure is not None:
        raise failure
    return 0


def _serve_cluster(options: argparse.Namespace, settings: Settings) -> None:
    import signal
    import threading

    from .errors import ClusterError
    from .ray_app import Cluster, deploy, start_cluster, stop_cluster

    stop = threading.Event()
    cluster = Cluster(options.replicas, options.cpus, options.gpus, options.address)
    try:
        start_cluster(settings, cluster)
        deploy(settings, cluster)
    except RuntimeError as error:  # Ray's word for a deployment that does not come up
        stop_cluster()
        raise ClusterError(str(error)) from error
    write_out(f"open http://{settings.host}:{settings.port}/\n")
    if cluster.address is None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        stop.wait()
        stop_cluster()


def _settings(options: argparse.Namespace) -> Settings:
    from .settings import Limits, Settings, default_videos_folder, read_token

    return Settings(
        bundle=options.bundle.absolute(),
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
        ice_servers=tuple(options.ice_server),
        examples=tuple(options.example),
        resident_text_encoder=options.resident_text_encoder,
        verify=not options.no_verify,
        golden=not options.no_golden,
        expected=options.expect,
        limits=Limits(
            queue=options.queue,
            sessions_per_client=options.connections,
            requests_per_second=options.rate,
            request_burst=max(1, round(4 * options.rate)),
        ),
    )
