"""Who may connect: addresses by which the server is called, origins of pages, bearer tokens, rates."""

from __future__ import annotations

import hmac
from collections import OrderedDict
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from .errors import RequestError
from .settings import Settings

__all__ = ["Guard", "RateLimit", "bearer_of"]

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_CLIENTS_REMEMBERED = 4096
_BEARER_PROTOCOL = "bearer."


class RateLimit:
    """Token buckets, one for each client: `rate` a second, `burst` at once."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def allows(self, client: str) -> bool:
        """Count a request of `client`; False if it is one too many."""
        now = self._clock()
        left, since = self._buckets.pop(client, (float(self._burst), now))
        left = min(float(self._burst), left + (now - since) * self._rate)
        allowed = left >= 1
        self._buckets[client] = (left - 1 if allowed else left, now)
        if len(self._buckets) > _CLIENTS_REMEMBERED:
            self._buckets.popitem(last=False)
        return allowed


class Guard:
    """Checks the headers of a request. Raises `RequestError` where one is refused."""

    def __init__(self, settings: Settings) -> None:
        self._token = settings.token
        self._origins = {origin.lower() for origin in settings.origins}
        self._hosts = {name.lower() for name in (*settings.hosts, settings.host)} | _LOOPBACK_NAMES
        # A page of another site can make a browser send requests to a name of its own that resolves to this machine.
        # Whoever needs a token is safe from that; so is a server whose names are not known.
        self._any_host = settings.token is not None or not settings.is_loopback
        for origin in settings.origins:
            self._hosts.add(_name(urlsplit(origin).netloc))

    def check_host(self, host: str | None) -> None:
        """Refuse names that are not this server's, where those are known.

        Raises:
            RequestError: (421) it is none of the server's names.
        """
        if not self._any_host and _name(host or "") not in self._hosts:
            raise RequestError(
                "wrong_host",
                "this server does not answer to that name; start it with --allow-host NAME",
                status=421,
            )

    def check_origin(self, origin: str | None, host: str | None) -> None:
        """Refuse pages of other sites. Programs that are no browsers send no origin.

        Raises:
            RequestError: (403) its pages may not use this server.
        """
        if origin is None or origin.lower() in self._origins:
            return
        parts = urlsplit(origin)
        if parts.scheme in ("http", "https") and host and parts.netloc.lower() == host.lower():
            return
        raise RequestError(
            "wrong_origin",
            "pages of that origin may not use this server; start it with --origin ORIGIN",
            status=403,
        )

    def check_token(self, token: str | None) -> None:
        """Refuse a missing or wrong token, where one is needed.

        Raises:
            RequestError: (401) there is none, or another one.
        """
        if self._token is None:
            return
        if token is None:
            raise RequestError(
                "no_token", "a bearer token is needed: Authorization: Bearer TOKEN", status=401
            )
        if not hmac.compare_digest(token.encode("utf-8", "replace"), self._token.encode()):
            raise RequestError("wrong_token", "the bearer token is not the server's", status=401)


def bearer_of(headers: Mapping[str, str]) -> str | None:
    """The token of an `Authorization` header, or of a WebSocket's sub-protocols, where pages have to put it."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value:
        return value.strip()
    for protocol in headers.get("sec-websocket-protocol", "").split(","):
        name = protocol.strip()
        if name.startswith(_BEARER_PROTOCOL):
            return name.removeprefix(_BEARER_PROTOCOL)
    return None


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if host.count(":") == 1 else host.lower()
