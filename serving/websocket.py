"""``/v1/stream``: live sessions over a WebSocket."""

from __future__ import annotations

from starlette.websockets import WebSocket

from .connection import Connection, connected
from .errors import RequestError
from .service import Service

__all__ = ["serve_stream"]

_POLICY = 1008


async def serve_stream(socket: WebSocket, service: Service) -> None:
    """Serve an accepted connection until either side leaves."""
    try:
        with connected(service, socket.client.host if socket.client else "unknown"):
            await Connection(socket, service).serve()
    except RequestError as error:
        await socket.close(_POLICY, str(error))
