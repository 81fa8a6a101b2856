"""Errors of the server. Their messages are shown to clients, so they name nothing of the machine."""

from __future__ import annotations

__all__ = ["BusyError", "ClusterError", "RequestError", "ServingError", "SettingsError"]


class ServingError(Exception):
    """Base class of what the server raises on purpose."""


class SettingsError(ServingError, ValueError):
    """An option of the server cannot be used."""


class ClusterError(ServingError):
    """Replicas did not come up in the cluster."""


class RequestError(ServingError):
    """A client's request cannot be served as it is. `code` is stable, for programs; `status` is HTTP's."""

    def __init__(self, code: str, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.code = code
        self.status = status


class BusyError(RequestError):
    """More is asked for than can be given now; `retry_after` says in how many seconds to try again."""

    def __init__(self, message: str, *, retry_after: int, code: str = "busy", status: int = 503) -> None:
        super().__init__(code, message, status=status)
        self.retry_after = retry_after
