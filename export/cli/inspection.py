"""The command `inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command import Command, output

__all__ = ["Inspect"]


class Inspect(Command):
    """Show what a bundle holds: components, engines, kernels, quantization, memory, sparsity, provenance, verdict.

    Launches, matrix products and activation memory are what each engine's own plan says. Files are verified first.
    """

    name = "inspect"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("bundle", type=Path, help="folder of the bundle")
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.add_argument("--html", type=output, metavar="FILE", help="also write an HTML page")

    def run(self, args: argparse.Namespace) -> int:
        from export.report.bundle import inspect_bundle

        inspect_bundle(args.bundle, as_json=args.json, page=args.html)
        return 0
