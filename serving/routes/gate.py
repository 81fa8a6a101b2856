"""What every HTTP request passes first: its name for this server, rate, size, origin, token. Pure ASGI."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import BusyError, RequestError
from serving.page import PUBLIC_PATHS
from serving.security import bearer_of
from serving.service import Service

__all__ = ["Gate", "error_response"]

_OPEN = PUBLIC_PATHS | {"/healthz", "/readyz"}
_READS = frozenset({"GET", "HEAD"})
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
)


class Gate:
    """Middleware that refuses what `Guard` refuses, and bodies that are too large."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check(scope, headers)
        except RequestError as error:
            self._service.metrics.refused.labels(error.code).inc()
            await _refuse(error, scope, receive, send)
            return
        if scope["type"] == "websocket":
            await self._app(scope, receive, send)
            return

        left = self._most(scope, headers)

        async def bounded() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise RequestError("too_large", "the body is too large", status=413)
            return message

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        await self._app(scope, bounded, guarded)

    def _check(self, scope: Scope, headers: Headers) -> None:
        service = self._service
        client = scope["client"][0] if scope.get("client") else "unknown"
        service.guard.check_host(headers.get("host"))
        if not service.requests.allows(client):
            raise BusyError("requests come too fast", retry_after=1, code="too_many_requests", status=429)
        if scope["type"] == "websocket":
            return  # its endpoint answers in a way that pages can read
        if scope["method"] not in _READS:
            service.guard.check_origin(headers.get("origin"), headers.get("host"))
        if scope["path"] not in _OPEN:
            service.guard.check_token(bearer_of(headers))
        length = headers.get("content-length", "0")
        most = self._most(scope, headers)
        if not length.isdigit() or int(length) > most:
            raise RequestError("too_large", f"the body has at most {most} bytes", status=413)

    def _most(self, scope: Scope, headers: Headers) -> int:
        """Bytes that a body may have: the form of a clip may come with an image."""
        limits = self._service.settings.limits
        is_form = headers.get("content-type", "").strip().lower().startswith("multipart/form-data")
        with_image = is_form and (scope.get("method"), scope["path"]) == ("POST", "/v1/videos")
        return limits.message_bytes + (limits.reference_bytes if with_image else 0)


def error_response(error: RequestError) -> JSONResponse:
    """An error as clients of OpenAI's API expect it."""
    body: dict[str, Any] = {
        "error": {"message": str(error), "type": "invalid_request_error", "param": None, "code": error.code}
    }
    if error.status >= 500:
        body["error"]["type"] = "server_error"
    headers = {}
    if isinstance(error, BusyError):
        headers["Retry-After"] = str(error.retry_after)
    elif error.status == 503:
        headers["Retry-After"] = "5"
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body, error.status, headers)


async def _refuse(error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        await error_response(error)(scope, receive, send)
        return
    await receive()  # websocket.connect
    if "websocket.http.response" in scope.get("extensions", {}):
        response = error_response(error)
        start = {
            "type": "websocket.http.response.start",
            "status": response.status_code,
            "headers": response.raw_headers,
        }
        await send(start)
        await send({"type": "websocket.http.response.body", "body": response.body})
    else:
        await send({"type": "websocket.close", "code": 1008, "reason": str(error)})
