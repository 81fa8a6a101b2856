"""The command `targets`."""

from __future__ import annotations

import argparse
import json

from runtime.terminal import console, write_out

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
            write_out(json.dumps(document, indent=1) + "\n")
            return 0

        from export.report.targets import target_table, variant_table

        console().print(target_table(targets), variant_table(variants))
        return 0
