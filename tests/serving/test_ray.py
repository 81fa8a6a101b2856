"""Two replicas in one Ray on loopback: twice as many clients as places, a killed replica, a rolling update."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from runtime.bundle import load_bundle, write_manifest
from tests.serving.client import StreamClient, http, wait_until

pytest.importorskip("ray", reason="Ray is not installed (extra ray)")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
OPTIONS = [
    "--replicas",
    "2",
    "--sessions",
    "1",
    "--threads",
    "1",
    "--cpus",
    "0.5",
    "--drain",
    "20",
    "--rate",
    "1000",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(bundle: Path, port: int, videos: Path, *more: str) -> list[str]:
    options = ["--port", str(port), "--videos", str(videos), *OPTIONS, *more]
    return [sys.executable, "-m", "serving", "ray", str(bundle), *options]


@pytest.fixture(scope="module")
def cluster(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address of the deployment, and its folder of clips."""
    videos, port = tmp_path_factory.mktemp("videos"), free_port()
    started = subprocess.Popen(command(small_bundle, port, videos), cwd=ROOT)
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        assert started.poll() is None
        try:
            return http(f"{url}/readyz").status == 200
        except OSError:
            return False

    try:
        assert wait_until(ready, 120)
        yield url, videos
    finally:
        started.send_signal(signal.SIGTERM)
        try:
            assert started.wait(60) == 0
        finally:
            started.kill()


def join(stack: ExitStack, url: str, within: float = 60, **start: object) -> StreamClient:
    """Connect until a replica takes the session, as the page does."""
    deadline = time.monotonic() + within
    while True:
        attempt = ExitStack()
        try:
            client = attempt.enter_context(StreamClient(url))
            client.send("start", id=0, prompt="a red fox", **start)
            receipt = client.until("receipt", timeout=within)
            if receipt["accepted"]:
                stack.push(attempt)
                return client
            assert receipt["error"]["code"] in ("elsewhere", "draining", "starting"), receipt
        except (ConnectionClosed, InvalidStatus, OSError):
            pass
        attempt.close()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def replicas() -> list[int]:
    """Processes that are replicas of the deployment under test."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                name = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if name.startswith(b"ray::ServeReplica:lightforcing:Replica"):
                found.append(int(entry.name))
    return found


def test_both_replicas_are_used_before_anybody_waits(cluster: tuple[str, Path]) -> None:
    url, _ = cluster
    with ExitStack() as stack:
        one, two = join(stack, url), join(stack, url)
        one.chunk(2)
        two.chunk(2)
        assert not one.of("queued") and not two.of("queued")
        waiting = stack.enter_context(StreamClient(url))
        waiting.send("start", id=1, prompt="a")
        assert waiting.until("queued")["position"] == 1


def test_twice_as_many_clients_as_places_are_all_served(cluster: tuple[str, Path]) -> None:
    url, _ = cluster
    reasons: list[str] = []

    def visit(seed: int) -> None:
        with ExitStack() as stack:
            client = join(stack, url, seed=seed, seconds=1.0)
            reasons.append(client.until("ended", timeout=60)["reason"])

    threads = [threading.Thread(target=visit, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert reasons == ["completed"] * 4


def test_a_killed_replica_ends_its_sessions_and_comes_back(cluster: tuple[str, Path]) -> None:
    url, _ = cluster
    before = replicas()
    assert len(before) == 2
    with ExitStack() as stack:
        clients = [join(stack, url), join(stack, url)]
        for client in clients:
            client.chunk(1)
        os.kill(before[0], signal.SIGKILL)
        cut, alive = [], []
        for client in clients:
            try:
                client.drain(5.0)
                alive.append(client)
            except ConnectionClosed as closed:
                cut.append(closed)
        assert len(cut) == len(alive) == 1
        reached = alive[0].of("chunk")[-1]["chunk"]
        alive[0].chunk(reached + 3)
        again = join(stack, url, 90)
        again.chunk(2)
    assert wait_until(lambda: len(replicas()) == 2, 60)


def test_a_rolling_update_cuts_no_session(
    cluster: tuple[str, Path], small_bundle: Path, tmp_path: Path
) -> None:
    url, videos = cluster
    newer = tmp_path / "newer"
    shutil.copytree(small_bundle, newer)
    write_manifest(newer, load_bundle(newer).manifest.model_copy(update={"name": "newer"}))
    with ExitStack() as stack:
        running = join(stack, url)
        assert running.hello["bundle"] == "handmade"
        running.chunk(1)
        port = int(url.rpartition(":")[2])
        update = subprocess.Popen(command(newer, port, videos, "--address", "auto"), cwd=ROOT)
        stack.callback(update.kill)
        running.drain(8.0)  # by now its replica, or the other one, is being replaced
        reached = running.of("chunk")[-1]["chunk"]
        running.chunk(reached + 4)  # whichever it is, it goes on with it
        assert not running.of("dropped")
        running.ask("cancel")
        assert running.until("ended")["reason"] == "cancelled"
        running.socket.close()
        assert update.wait(120) == 0
        for _ in range(3):
            client = join(stack, url)
            assert client.hello["bundle"] == "newer"
            client.socket.close()
