"""What clients of a server see: `python -m benchmarks.serving BUNDLE`.

Starts a server on loopback and lets 1, 2, 4 and 8 clients watch endless streams with random prompt switches, each
with a screen that shows chunks at the video's rate. Reported as the clients saw it: time to the first picture,
time between chunks, real-time factor, stalls, from a switch to its receipt and to its picture, what was dropped; and
the server's memory and open files while it worked. Clients and server share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

if TYPE_CHECKING:
    from .clients import Seen

__all__ = ["main"]

ROOT = Path(__file__).parents[2]
PROMPTS = [
    f"a {colour} circle on {ground} orbits clockwise from the top"
    for colour in ("red", "blue", "cyan", "yellow")
    for ground in ("grey", "brown")
]
_SWITCH_EVERY = 6.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    options = _parser().parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    clients = [int(count) for count in options.clients.split(",")]
    result: dict[str, Any] = {"environment": _environment(), "bundle": options.bundle.name, "cases": []}
    target = options.out / f"serving-{options.name}.json"
    for count in clients:
        with _server(options.bundle, count, options.threads) as server:
            case = _case(server, count, options.seconds, None)
        result["cases"].append(case)
        target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.soak_chunks:
        with _server(options.bundle, 2, options.threads) as server:
            result["soak"] = _case(server, 2, 3600.0, options.soak_chunks // 2)
        target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(_table([*result["cases"], *([result["soak"]] if "soak" in result else [])]))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", type=Path, help="folder of the bundle")
    parser.add_argument(
        "--clients", default="1,2,4,8", help="numbers of clients, each with a place (1,2,4,8)"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="how long each number watches (60)")
    parser.add_argument("--threads", type=int, help="CPU threads per forward")
    parser.add_argument(
        "--soak-chunks", type=int, default=0, help="then two clients until so many chunks came (0)"
    )
    parser.add_argument("--name", default="here", help="last part of the result's file name")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder for results")
    return parser


@contextmanager
def _server(bundle: Path, places: int, threads: int | None) -> Iterator[tuple[str, int]]:
    """A server on loopback with so many places: its address and process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "serving",
        "run",
        str(bundle),
        "--port",
        str(port),
        "--sessions",
        str(places),
    ]
    if threads is not None:
        command += ["--threads", str(threads)]
    started = subprocess.Popen(
        [*command, "--log-level", "ERROR", "--drain", "1"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert started.stdout is not None
    try:
        if not started.stdout.readline().startswith("open "):
            raise SystemExit("error: the server did not start; its message is above")
        yield f"http://127.0.0.1:{port}", started.pid
    finally:
        started.terminate()
        started.wait(30)


def _case(server: tuple[str, int], count: int, seconds: float, chunks: int | None) -> dict[str, Any]:
    from .clients import watch

    url, pid = server
    usage: list[dict[str, float]] = []

    async def sample() -> None:
        begun = time.monotonic()
        while True:
            usage.append({"at": round(time.monotonic() - begun, 1), **_usage(pid)})
            await asyncio.sleep(2.0)

    async def run() -> list[Seen]:
        sampling = asyncio.create_task(sample())
        watching = [
            watch(url, PROMPTS, seconds=seconds, switch_every=_SWITCH_EVERY, seed=seed, chunks=chunks)
            for seed in range(count)
        ]
        seen = await asyncio.gather(*watching)
        sampling.cancel()
        return list(seen)

    load = os.getloadavg()[0]
    return {
        "clients": count,
        "load_before": round(load, 2),
        **_summary(asyncio.run(run())),
        "usage": _usage_summary(usage),
        "server": _metrics(url),
    }


def _summary(seen: list[Seen]) -> dict[str, Any]:
    def pool(name: str) -> list[float]:
        return [value for one in seen for value in getattr(one, name)]

    outside = [pair for one in seen for pair in one.outside_engines]
    watched = sum(one.watched for one in seen)
    return {
        "chunks": sum(one.chunks for one in seen),
        "first_frame_s": _spread([one.first_frame for one in seen if one.first_frame is not None]),
        "chunk_interval_s": _spread(pool("intervals")),
        "realtime_factor": round(sum(one.video for one in seen) / watched, 3),
        "stalls_per_minute": round(60 * sum(one.stalls for one in seen) / watched, 2),
        "stalled_percent": round(100 * sum(one.stalled for one in seen) / watched, 2),
        "switch_to_receipt_s": _spread(pool("receipts")),
        "switch_to_picture_s": _spread(pool("pictures")),
        "dropped_frames": sum(one.dropped_frames for one in seen),
        "encode_ms_per_frame": round(1000 * sum(pool("encode_per_frame")) / len(pool("encode_per_frame")), 3),
        "outside_engines_percent": round(
            100 * sum(own for own, _ in outside) / sum(all_ for _, all_ in outside), 2
        ),
    }


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)

    def at(fraction: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(fraction * len(ordered)))], 4)

    return {"n": len(ordered), "p50": at(0.5), "p95": at(0.95), "p99": at(0.99), "max": round(ordered[-1], 4)}


def _usage(pid: int) -> dict[str, float]:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return {
        "rss_mib": round(int(fields["VmRSS"].split()[0]) / 1024, 1),
        "threads": int(fields["Threads"]),
        "files": len(os.listdir(f"/proc/{pid}/fd")),
    }


def _usage_summary(usage: list[dict[str, float]]) -> dict[str, Any]:
    """The first fifth warms up; then the beginning against the end."""
    warm = usage[len(usage) // 5 :]
    third = max(1, len(warm) // 3)
    return {
        name: {
            "begin": max(entry[name] for entry in warm[:third]),
            "end": max(entry[name] for entry in warm[-third:]),
        }
        for name in ("rss_mib", "threads", "files")
    }


def _metrics(url: str) -> dict[str, float]:
    with urlopen(f"{url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    wanted = (
        "lightforcing_stage_seconds_total",
        "lightforcing_stalls_total",
        "lightforcing_sent_frames_total",
    )
    return {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(wanted)
    }


def _environment() -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        **{name: version(name) for name in ("uvicorn", "fastapi", "websockets", "av", "onnxruntime")},
    }


def _table(cases: list[dict[str, Any]]) -> str:
    head = ("clients", "chunks", "first frame", "interval p50/p95/p99", "real time", "stalled", "receipt p95",
            "picture p50/p95", "dropped", "encode", "outside")  # fmt: skip
    rows = [head, ("---",) * len(head)]
    for case in cases:
        interval, picture = case["chunk_interval_s"], case["switch_to_picture_s"]
        rows.append(
            (
                str(case["clients"]),
                str(case["chunks"]),
                f"{case['first_frame_s']['p50']:.2f} s",
                "/".join(f"{interval[part]:.2f}" for part in ("p50", "p95", "p99")) + " s",
                f"{case['realtime_factor']:.2f}",
                f"{case['stalled_percent']:.0f} %",
                f"{1000 * case['switch_to_receipt_s']['p95']:.0f} ms",
                f"{picture['p50']:.1f}/{picture['p95']:.1f} s" if picture else "-",
                str(case["dropped_frames"]),
                f"{case['encode_ms_per_frame']:.2f} ms",
                f"{case['outside_engines_percent']:.1f} %",
            )
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
