"""Errors raised by the reference model. Every message says what was found, what was expected and what to do."""

from __future__ import annotations

__all__ = ["CheckpointError", "ConfigError", "LightForcingError"]


class LightForcingError(Exception):
    """Base class of every error this package raises on purpose."""


class ConfigError(LightForcingError, ValueError):
    """A setting is outside the range in which the model is defined."""


class CheckpointError(LightForcingError):
    """A checkpoint cannot be read, or does not belong to the model it was given for."""
