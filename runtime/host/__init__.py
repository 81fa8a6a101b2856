"""Execution on the host."""

from .inductor import load_package_file
from .runner import HostRunner

__all__ = ["HostRunner", "load_package_file"]
