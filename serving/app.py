"""The HTTP application: the page, the live stream, clips, health, metrics."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.util import find_spec
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.websockets import WebSocket

from . import page
from .errors import BusyError, RequestError
from .live.protocol import SUBPROTOCOL
from .metrics import CONTENT_TYPE_LATEST
from .routes import videos
from .routes.gate import Gate, error_response
from .security import bearer_of
from .service import Service
from .settings import Settings
from .transport.websocket import serve_stream

__all__ = ["create_app"]


def create_app(
    settings: Settings, on_loaded: Callable[[Exception | None], None] = lambda _: None, *, wait: bool = False
) -> FastAPI:
    """The application for a bundle. It loads when the server starts, and answers 503 until it has.

    `on_loaded` is called when it has, or with the error if it cannot. With `wait` the application starts only then,
    and raises the error. `app.state.service` is the `Service`.
    """
    service = Service(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async def start() -> None:
            await service.start()
            if service.error is not None or service.state == "ready":
                on_loaded(service.error)

        starting = asyncio.create_task(start())
        if wait:
            await starting
            if service.error is not None:
                raise service.error
        try:
            yield
        finally:
            await asyncio.gather(starting, return_exceptions=True)
            await service.close()

    app = FastAPI(
        title="lightforcing serving",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/v1/openapi.json",
    )
    app.state.service = service
    app.add_middleware(Gate, service=service)
    _handle_errors(app)
    _add_state_routes(app, service)
    app.include_router(page.router())
    app.include_router(videos.router(service))
    if find_spec("aiortc") is not None:
        from .transport import webrtc

        app.include_router(webrtc.router(service))

    @app.websocket("/v1/stream")
    async def stream(socket: WebSocket) -> None:
        headers = socket.headers
        try:
            service.guard.check_origin(headers.get("origin"), headers.get("host"))
            service.guard.check_token(bearer_of(headers))
        except RequestError as error:
            service.metrics.refused.labels(error.code).inc()
            await socket.send_denial_response(error_response(error))
            return
        offered = socket.scope.get("subprotocols", [])
        await socket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
        await serve_stream(socket, service)

    return app


def _add_state_routes(app: FastAPI, service: Service) -> None:
    @app.get("/healthz")
    async def health() -> Response:
        """Whether the process does its work: 503 if loading failed or a worker ended."""
        alive = service.state != "failed"
        if service.state == "ready":
            alive = service.pipeline.health().alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    @app.get("/readyz")
    async def ready() -> Response:
        """Whether sessions are taken: after loading and verification, until the server stops."""
        body: dict[str, Any] = {"status": service.state}
        if service.state == "starting":
            body["stage"] = service.stage
        elif service.state == "ready":
            body["places"] = service.places.total
            body["places_taken"] = service.places.taken
            body["queue"] = service.places.waiting
        return JSONResponse(body, 200 if service.state == "ready" else 503)

    @app.get("/v1/bundle")
    async def bundle() -> dict[str, Any]:
        """What is being served."""
        return service.bundle()

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.exposition(), media_type=CONTENT_TYPE_LATEST)


def _handle_errors(app: FastAPI) -> None:
    handlers: dict[type[Exception], Callable[[Request, Any], Awaitable[Response]]] = {}

    async def refused(_: Request, error: RequestError) -> Response:
        return error_response(error)

    async def unusable(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
        return error_response(RequestError("bad_request", f"{where}: {first['msg']}", status=422))

    async def http(_: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "wrong_method"}.get(error.status_code, "bad_request")
        return error_response(RequestError(code, error.detail, status=error.status_code))

    async def unexpected(_: Request, error: Exception) -> Response:
        return error_response(
            RequestError("internal", "the server made a mistake; its log says more", status=500)
        )

    handlers[RequestError] = handlers[BusyError] = refused
    handlers[RequestValidationError] = unusable
    handlers[HTTPException] = http
    handlers[Exception] = unexpected
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
