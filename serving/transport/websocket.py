"""`/v1/stream`: live sessions over a WebSocket."""

from __future__ import annotations

from starlette.websockets import WebSocket

from serving.errors import RequestError
from serving.service import Service

from .connection import Connection, connected

__all__ = ["serve_stream"]

_POLICY = 1008


async def serve_stream(socket: WebSocket, service: Service) -> None:
    """Serve an accepted connection until either side leaves."""
    try:
        with connected(service, socket.client.host if socket.client else "unknown"):
            await Connection(socket, service).serve()
    except RequestError as error:
        await socket.close(_POLICY, str(error))
