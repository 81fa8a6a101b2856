"""Runs the application under uvicorn, and stops it gracefully."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from .app import create_app
from .service import Service
from .settings import Settings

__all__ = ["Server", "serve", "uvicorn_config"]

_log = logging.getLogger("serving")
_CLOSE_SECONDS = 5


class Server(uvicorn.Server):
    """A server that drains on the first SIGTERM or SIGINT and stops at once on the second."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float) -> None:
        super().__init__(config)
        self._service = service
        self._drain_seconds = drain_seconds
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.url = ""
        """Where it listens, once it does."""

    async def startup(self, sockets: list[Any] | None = None) -> None:
        """See uvicorn."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            for server in self.servers:
                for socket in server.sockets:
                    host, port = socket.getsockname()[:2]
                    address = f"[{host}]" if ":" in host else host
                    self.url = f"http://{address}:{port}/"
                    _log.info("listening", extra={"fields": {"url": self.url}})

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came."""
        if self._loop is None or self._draining is not None or self._loop.is_closed():
            self.should_exit = self.force_exit = True
            return
        _log.info("stopping", extra={"fields": {"signal": signal.Signals(sig).name}})
        self._loop.call_soon_threadsafe(self._begin_draining)

    def _begin_draining(self) -> None:
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        await self._service.drain(self._drain_seconds)
        self.should_exit = True


def serve(settings: Settings, on_ready: Callable[[str], None]) -> Exception | None:
    """Serve until a signal; the error if the bundle could not be loaded. `on_ready` gets the page's address."""
    failure: list[Exception] = []

    def loaded(error: Exception | None) -> None:
        if error is None:
            on_ready(server.url)
        else:
            failure.append(error)
            server.should_exit = True

    app = create_app(settings, loaded)
    server = Server(uvicorn_config(app, settings), app.state.service, settings.drain_seconds)
    server.run()
    return failure[0] if failure else None


def uvicorn_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """How uvicorn serves the application: sizes and times of the settings, no headers believed, no logs of its own."""
    limits = settings.limits
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="websockets-sansio",
        ws_max_size=limits.message_bytes,
        ws_ping_interval=limits.ack_timeout,
        ws_ping_timeout=limits.ack_timeout,
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=_CLOSE_SECONDS,
        loop="asyncio",
    )
