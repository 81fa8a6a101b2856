"""The command `targets`."""

from __future__ import annotations

import argparse
import json

from .command import Command

__all__ = ["Targets"]


class Targets(Command):
    """List the targets and variants, or show one of them in full."""

    name = "targets"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("target", nargs="?", help="name or TOML file (default: all of them)")
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        from export.request.targets import list_targets, list_variants, load_target

        targets = list_targets() if args.target is None else (load_target(args.target),)
        variants = list_variants()
        if args.json:
            document = {
                "targets": [t.model_dump() for t in targets],
                "variants": [v.model_dump() for v in variants],
            }
            print(json.dumps(document, indent=1))
            return 0
        from rich.console import Console

        from export.report.targets import target_table, variant_table

        Console().print(target_table(targets), variant_table(variants))
        return 0
