"""What goes wrong in the world: signals, failing workers, clients that come and go by the hundred."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from runtime import EngineError
from tests.serving.client import StreamClient, http, wait_until
from tests.serving.conftest import StartServer

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def process(
    bundle: Path, videos: Path, *options: str
) -> Iterator[tuple[subprocess.Popen[str], list[dict[str, Any]]]]:
    """`python -m serving run` as a process of its own, and its log as it grows."""
    command = [sys.executable, "-m", "serving", "run", str(bundle), "--port", "0", "--threads", "1"]
    started = subprocess.Popen(
        [*command, "--videos", str(videos), *options], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    lines: list[dict[str, Any]] = []

    def read() -> None:
        assert started.stderr is not None
        for line in started.stderr:
            lines.append(json.loads(line) if line.startswith("{") else {"message": line.strip()})

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield started, lines
    finally:
        started.kill()
        started.wait(10)
        thread.join(10)


def url_of(lines: list[dict[str, Any]]) -> str:
    assert wait_until(lambda: any(line["message"] == "ready" for line in lines), 60), lines
    return next(str(line["url"]).rstrip("/") for line in lines if line["message"] == "listening")


def test_sigterm_lets_sessions_end_and_then_ends_them(small_bundle: Path, tmp_path: Path) -> None:
    with process(small_bundle, tmp_path, "--drain", "1.5", "--sessions", "2") as (server, lines):
        url = url_of(lines)
        with StreamClient(url) as short, StreamClient(url) as endless, StreamClient(url) as waiting:
            short.start("a secret prompt", seconds=0.5)
            endless.start("a")
            waiting.send("start", id=1, prompt="a")
            waiting.until("queued")
            server.send_signal(signal.SIGTERM)
            begun = time.monotonic()
            assert waiting.until("receipt")["error"]["code"] == "draining"
            assert http(f"{url}/readyz").json["status"] == "draining"
            assert short.until("ended")["reason"] == "completed"
            ended = endless.until("ended")
            assert (ended["reason"], ended["message"]) == ("shutdown", "the server is stopping")
            assert 1.4 < time.monotonic() - begun < 5
            with pytest.raises(ConnectionClosed) as closed:
                endless.receive()
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1012
        assert server.wait(20) == 0
    text = json.dumps(lines)
    assert "a secret prompt" not in text  # only its length and a digest
    started = next(line for line in lines if line["message"] == "session started")
    assert started["prompt_chars"] == 15 and len(started["session"]) == 12
    reasons = {line["reason"] for line in lines if line["message"] == "session ended"}
    assert reasons == {"completed", "shutdown"}


def test_a_second_signal_stops_at_once(small_bundle: Path, tmp_path: Path) -> None:
    with process(small_bundle, tmp_path, "--drain", "60") as (server, lines):
        client = StreamClient(url_of(lines))
        client.start("a")
        server.send_signal(signal.SIGINT)
        assert wait_until(lambda: any(line["message"] == "draining" for line in lines))
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0


def test_exit_codes(small_bundle: Path, tmp_path: Path) -> None:
    missing = subprocess.run(
        [sys.executable, "-m", "serving", "run", str(tmp_path / "nothing"), "--port", "0"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert missing.returncode == 2 and "nothing" in missing.stderr.splitlines()[-1]
    pinned = subprocess.run(
        [sys.executable, "-m", "serving", "run", str(small_bundle), "--port", "0", "--expect", "0" * 64],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert pinned.returncode == 2 and "another bundle than the one that was pinned" in pinned.stderr
    open_to_all = subprocess.run(
        [sys.executable, "-m", "serving", "run", str(small_bundle), "--host", "0.0.0.0"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert open_to_all.returncode == 2 and "--token-file" in open_to_all.stderr


def test_a_worker_that_fails_one_session_leaves_the_others_as_they_are(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server(sessions=4)

    def stream(client: StreamClient, seed: int) -> None:
        client.start("a red fox", seed=seed, seconds=1.0)

    def ending(client: StreamClient) -> tuple[dict[str, Any], list[bytes]]:
        return client.until("ended"), [frame.payload for frame in client.frames]

    expected = []
    for seed in range(4):
        with StreamClient(server.url) as client:
            stream(client, seed)
            expected.append(ending(client)[1])
    engine = server.service.pipeline.engine
    denoise, broken = engine.denoise, 3

    def failing(session: int, step: int) -> float:
        if session == broken and server.service.places.taken == 4:
            raise EngineError(f"out of memory in {ROOT}")
        return denoise(session, step)

    monkeypatch.setattr(engine, "denoise", failing)
    clients = [StreamClient(server.url) for _ in range(4)]
    for seed, client in enumerate(clients):
        stream(client, seed)
    with ThreadPoolExecutor(4) as pool:
        endings = list(pool.map(ending, clients))
    assert sorted(ended["reason"] for ended, _ in endings) == ["completed"] * 3 + ["failed"]
    for client, (ended, payloads), wanted in zip(clients, endings, expected, strict=True):
        if ended["reason"] == "completed":
            assert payloads == wanted
        else:
            assert "other sessions are not affected" in ended["message"]
        assert str(ROOT) not in json.dumps(client.messages)
        client.socket.close()
    assert wait_until(lambda: server.service.places.taken == 0)


def test_two_hundred_clients_come_and_go_and_leave_nothing(small_bundle: Path, tmp_path: Path) -> None:
    rng = random.Random(5)

    def visit(url: str, leave: int) -> None:
        client = StreamClient(url)
        if leave:
            client.send("start", id=1, prompt="a")
            client.receive()
        if leave == 2:
            client.send("set_prompt", id=2, prompt="snow")
        if leave == 3:
            client.socket.socket.shutdown(socket.SHUT_RDWR)  # no closing handshake
        client.socket.close()

    with process(small_bundle, tmp_path, "--rate", "10000") as (server, lines):
        url = url_of(lines)

        def idle() -> bool:
            ready = http(f"{url}/readyz").json
            metrics = http(f"{url}/metrics").body.decode()
            return ready["places_taken"] == ready["queue"] == 0 and "lightforcing_connections 0.0" in metrics

        def usage() -> tuple[int, int, int]:
            status = dict(
                line.split(":", 1) for line in Path(f"/proc/{server.pid}/status").read_text().splitlines()
            )
            files = len(os.listdir(f"/proc/{server.pid}/fd"))
            return files, int(status["Threads"]), int(status["VmRSS"].split()[0])

        for number in range(40):
            visit(url, number % 4)
        assert wait_until(idle)
        before = usage()
        for _ in range(200):
            visit(url, rng.randrange(4))
        assert wait_until(idle, 120)  # what two hundred have begun ends one after another on a busy machine
        after = usage()
        # The event loop's own pool makes its threads as they are needed, up to a limit.
        pool = min(32, (os.cpu_count() or 1) + 4)
        assert after[0] <= before[0] + 2 and after[1] <= before[1] + pool, (before, after)
        assert after[2] <= before[2] + 20_000, (before, after)  # KiB
        with StreamClient(url) as client:
            client.start("a", seconds=0.25)
            assert client.until("ended")["reason"] == "completed"


def test_load_and_signals_together(small_bundle: Path, tmp_path: Path) -> None:
    """SIGTERM while clients stream, switch, wait and ask for clips: all hear why, the process ends, nothing hangs."""
    with process(small_bundle, tmp_path, "--drain", "0.3", "--sessions", "2") as (server, lines):
        url = url_of(lines)
        heard: list[str] = []

        def live(number: int) -> None:
            try:
                with StreamClient(url) as client:
                    client.send("start", id=number, prompt="a")
                    while True:
                        message = client.receive()
                        if isinstance(message, dict):
                            if message["type"] == "chunk":
                                client.send("set_prompt", id=f"s{message['chunk']}", prompt="snow")
                            if message["type"] == "ended":
                                heard.append(message["reason"])
                                return
                            if message["type"] == "receipt" and not message["accepted"]:
                                heard.append(message["error"]["code"])
                                return
            except ConnectionClosed as closed:
                heard.append(str(closed.rcvd.code if closed.rcvd else "lost"))

        threads = [threading.Thread(target=live, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        job = http(f"{url}/v1/videos", method="POST", body={"prompt": "a", "seconds": 300}).json
        time.sleep(1.0)
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
    assert len(heard) == 6 and set(heard) <= {"shutdown", "draining", "no_session", "1012"}, heard
    record = json.loads((tmp_path / f"{job['id']}.json").read_text())
    assert record["status"] == "failed" and record["error"]["code"] == "server_stopped"
