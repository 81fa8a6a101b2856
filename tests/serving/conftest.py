from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from runtime.bundle import write_manifest
from serving.app import create_app
from serving.server import uvicorn_config
from serving.service import Service
from serving.settings import Limits, Settings
from tests.conftest import build
from tests.runtime import handmade
from tests.serving.client import wait_until

FPS = 64


@dataclass
class RunningServer:
    """A server on loopback, in a thread of this process."""

    url: str
    service: Service
    loop: asyncio.AbstractEventLoop


StartServer = Callable[..., RunningServer]


@contextmanager
def running(settings: Settings) -> Iterator[RunningServer]:
    """Serve until the block ends."""
    app = create_app(settings)
    server = uvicorn.Server(uvicorn_config(app, settings))
    loops: list[asyncio.AbstractEventLoop] = []

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        assert wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        service: Service = app.state.service
        assert wait_until(lambda: service.state in ("ready", "failed"), 60)
        yield RunningServer(f"http://127.0.0.1:{port}", service, loops[0])
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Computes a chunk in milliseconds; its video runs at four times the usual rate. Do not change its files."""
    folder = tmp_path_factory.mktemp("served") / "handmade"
    manifest = handmade.build_bundle(folder)
    write_manifest(
        folder, manifest.model_copy(update={"model": manifest.model.model_copy(update={"fps": FPS})})
    )
    return folder


@pytest.fixture(scope="session")
def starting_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small bundle with a video encoder, at the usual rate. Do not change its files."""
    folder = tmp_path_factory.mktemp("starting") / "handmade"
    handmade.build_bundle(folder, with_encoder=True)
    return folder


@pytest.fixture(scope="session")
def trained_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's bundle: `tiny` with its trained weights, which paints what captions say. Do not change its files."""
    from export.request.weights import shipped_weights
    from lightforcing_ref.config import PRESETS

    weights = shipped_weights(PRESETS["tiny"], dense=True)
    return build(tmp_path_factory.mktemp("trained"), "dense", weights=weights)


@pytest.fixture
def start_server(small_bundle: Path, tmp_path: Path) -> Iterator[StartServer]:
    """Starts servers with options of `Settings` and `Limits`; they end with the test."""
    with ExitStack() as stack:

        def start(*, bundle: Path = small_bundle, limits: dict[str, Any] | None = None, **options: Any):  # type: ignore[no-untyped-def]
            options = {
                "sessions": 2,
                "threads": 1,
                "videos": tmp_path / "videos",
                "drain_seconds": 0.0,
                **options,
            }
            settings = Settings(bundle=bundle, port=0, limits=Limits(**(limits or {})), **options)
            return stack.enter_context(running(settings))

        yield start


@pytest.fixture(scope="module")
def server(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Two places, a queue of two."""
    limits = Limits(queue=2, request_burst=10_000)
    videos = tmp_path_factory.mktemp("videos")
    settings = Settings(
        bundle=small_bundle, port=0, sessions=2, threads=1, videos=videos, drain_seconds=0.0, limits=limits
    )
    with running(settings) as started:
        yield started
