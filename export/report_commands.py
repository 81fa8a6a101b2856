"""The commands that report: `inspect`, `compare`, `targets`, `doctor`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from .command import (
    DEFAULT_OUT,
    Command,
    add_decoder_and_text_files,
    add_transformer_files,
    check_sources,
    positive,
    tolerance,
)

if TYPE_CHECKING:
    from .reference import Reference

__all__ = ["Compare", "Doctor", "Inspect", "Targets"]


class Inspect(Command):
    """Show what a bundle holds: components, shapes, sizes, sparsity table, provenance."""

    name = "inspect"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("bundle", type=Path, help="folder of the bundle")
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        from .inspect import inspect_bundle

        inspect_bundle(args.bundle, as_json=args.json)
        return 0


class Compare(Command):
    """Compare a bundle with the reference model: per component, per step and over a whole rollout.

    Exit code 1 where a result is past its tolerance.
    """

    name = "compare"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("bundle", type=Path, help="folder of the bundle")
        parser.add_argument("--chunks", type=positive, default=3, help="length of the rollout (default: 3)")
        parser.add_argument(
            "--tolerance", type=tolerance, help="largest relative L2 error (default: the precision's)"
        )
        parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
        files = parser.add_argument_group(
            "the files the bundle was built from, unless its weights are random"
        )
        add_transformer_files(files)
        add_decoder_and_text_files(files)

    def run(self, args: argparse.Namespace) -> int:
        check_sources(args)
        from .compare import compare_bundle

        passed = compare_bundle(
            args.bundle,
            chunks=args.chunks,
            tolerance=args.tolerance,
            json_path=args.json,
            reference=_reference(args) if args.checkpoint else None,
        )
        return 0 if passed else 1


class Targets(Command):
    """List the targets and variants, or show one of them in full."""

    name = "targets"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("target", nargs="?", help="name or TOML file (default: all of them)")
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        from .targets import list_targets, list_variants, load_target

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

        from .tables import target_table, variant_table

        Console().print(target_table(targets), variant_table(variants))
        return 0


class Doctor(Command):
    """Report what this machine can build and run, and why not.

    Exit code 1 where something is broken: a library that does not load or is not the installed one, packages that
    exclude each other, or nothing that can be built at all.
    """

    name = "doctor"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        from .doctor import examine

        report = examine(DEFAULT_OUT)
        if args.json:
            print(json.dumps(report.as_dict(), indent=1))
        else:
            from rich.console import Console

            from .tables import doctor_tables

            Console().print(*doctor_tables(report))
        return 1 if report.problems else 0


def _reference(args: argparse.Namespace) -> Reference:
    """The reference model of a bundle that was built from files."""
    from lightforcing_ref.config import preset
    from runtime.bundle import load_bundle

    from .reference import Reference
    from .weights import Weights

    manifest = load_bundle(args.bundle, verify=False).manifest
    return Reference(
        Weights(
            preset(manifest.model.preset),
            checkpoint=args.checkpoint,
            lora=args.lora,
            vae=args.vae,
            text_encoder=args.text_encoder,
            tokenizer=args.tokenizer,
        )
    )
