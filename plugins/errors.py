"""Errors raised by the operators. Every message says what was found, what was expected and what to do."""

from __future__ import annotations

__all__ = ["ContractError", "PluginError", "UnboundOperatorError"]


class PluginError(Exception):
    """Base class of every error this package raises on purpose."""


class ContractError(PluginError, ValueError):
    """An attribute or a shape lies outside an operator's contract."""


class UnboundOperatorError(PluginError, RuntimeError):
    """An operator was called on a device for which no kernel has been bound."""
