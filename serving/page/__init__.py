"""The page: a few hand-written files, read once, served as they are. Nothing is built or fetched from elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import APIRouter, Request, Response

__all__ = ["PUBLIC_PATHS", "router"]

_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/page/connection.js": ("connection.js", "text/javascript; charset=utf-8"),
    "/page/player.js": ("player.js", "text/javascript; charset=utf-8"),
    "/page/strip.js": ("strip.js", "text/javascript; charset=utf-8"),
    "/favicon.svg": ("favicon.svg", "image/svg+xml"),
}
PUBLIC_PATHS = frozenset(_FILES)
"""Served to anybody: the page asks for the token itself."""
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def router() -> APIRouter:
    """The routes of the page."""
    routes = APIRouter()
    for path, (name, kind) in _FILES.items():
        body = files(__name__).joinpath(name).read_bytes()
        routes.add_api_route(path, _serve(body, kind), include_in_schema=False)
    return routes


def _serve(body: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
    headers = {"ETag": tag, "Cache-Control": "no-cache", "Content-Security-Policy": _POLICY}

    async def serve(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=kind, headers=headers)

    return serve
