"""The command `doctor`."""

from __future__ import annotations

import argparse
import json

from runtime.terminal import console, write_out

from .command import DEFAULT_OUT, Command

__all__ = ["Doctor"]


class Doctor(Command):
    """Report what this machine can build and run, and why not.

    Exit code 1 where something is broken: a library that does not load or is not the installed one, packages that
    exclude each other, or nothing that can be built at all.
    """

    name = "doctor"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        from export.report.doctor import examine

        report = examine(DEFAULT_OUT)
        if args.json:
            write_out(json.dumps(report.as_dict(), indent=1) + "\n")
        else:
            from export.report.doctor import doctor_tables

            console().print(*doctor_tables(report))
        return 1 if report.problems else 0
