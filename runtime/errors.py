"""Errors of the runtime.

Every error that the runtime raises on purpose derives from `LightForcingError`. A message says what
was found, what was expected, and what to do.
"""

from __future__ import annotations

__all__ = [
    "BundleError",
    "BundleIntegrityError",
    "BundleSchemaError",
    "CapacityError",
    "ChunkTimeoutError",
    "ClosedError",
    "EngineError",
    "InputError",
    "LightForcingError",
    "SessionCancelledError",
    "SessionFailedError",
]


class LightForcingError(Exception):
    """Base class of everything the runtime raises on purpose."""


class BundleError(LightForcingError):
    """A bundle cannot be used: missing, incomplete, or inconsistent."""


class BundleSchemaError(BundleError):
    """The manifest is not one that this runtime can read (malformed, or of a newer schema)."""


class BundleIntegrityError(BundleError):
    """A file of the bundle is missing, lies outside the folder, or differs from its recorded hash."""


class InputError(LightForcingError, ValueError):
    """An argument of the caller (prompt, embedding, seconds, seed, ...) is outside what is accepted."""


class CapacityError(LightForcingError):
    """Not enough memory or session slots for what was asked.

    `needed` and `free` are bytes.
    """

    def __init__(self, message: str, *, needed: int, free: int) -> None:
        super().__init__(message)
        self.needed = needed
        self.free = free


class EngineError(LightForcingError):
    """An engine could not be loaded or a forward failed."""


class ChunkTimeoutError(LightForcingError, TimeoutError):
    """The next chunk did not come in time. The session goes on."""


class ClosedError(LightForcingError):
    """The pipeline or session has been closed."""


class SessionCancelledError(LightForcingError):
    """The session was cancelled while a chunk was awaited."""


class SessionFailedError(LightForcingError):
    """A worker failed while it served this session; the cause is chained. The pipeline stays usable."""
