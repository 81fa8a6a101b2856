"""Errors of the export tools. Every message says what was found, what was expected and what to do."""

from __future__ import annotations

__all__ = ["BuildError", "ComparisonError", "DownloadError", "ExportError", "InputError"]


class ExportError(Exception):
    """Base class of every error the export tools raise on purpose."""


class InputError(ExportError, ValueError):
    """An argument (target, preset, resolution, sparsity, path, ...) is outside what is accepted."""


class BuildError(ExportError):
    """A build cannot be started, or cannot go on; what is finished is kept and the build resumes."""


class ComparisonError(ExportError):
    """A comparison cannot be made; not raised for results that differ, which are reported."""


class DownloadError(ExportError):
    """A file or a bundle cannot be brought here or sent away; what has arrived of a file is kept, and resumed from."""
