"""The commands that report: `plan`, `inspect`, `compare`, `targets`, `doctor`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from export.errors import InputError

from .arguments import chosen_variant
from .command import (
    DEFAULT_OUT,
    Command,
    add_decoder_and_text_files,
    add_model_arguments,
    add_transformer_files,
    check_sources,
    fraction,
    output,
    positive,
    tolerance,
)

if TYPE_CHECKING:
    from export.compare.reference import Reference
    from export.compare.result import Comparison
    from export.report.plan import PlanRequest

__all__ = ["Compare", "Doctor", "Inspect", "Plan", "Targets"]


class Plan(Command):
    """Plan a bundle without building it: memory, checked against the target's, and the predicted floor per chunk.

    Takes the arguments of `build` on model, variant and target. Nothing is measured: times follow from sizes and
    published peak rates, and real ones are longer. Exit code 1 where the plan does not fit into the target's memory.
    """

    name = "plan"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_model_arguments(parser)
        parser.add_argument(
            "--precision",
            metavar="NAME",
            help="fp32, bf16, fp8 or nvfp4 (default: fp8, or the target's best)",
        )
        parser.add_argument(
            "--sessions", type=positive, default=1, metavar="N", help="concurrent rollouts (default: 1)"
        )
        parser.add_argument(
            "--efficiency",
            type=efficiency,
            default=0.6,
            metavar="E",
            help="share of the peak rates that the second column assumes (default: 0.6)",
        )
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        from export.estimate.memory import plan_memory
        from export.report.plan import plan_document, plan_tables

        request = _planned(args)
        memory = plan_memory(request, args.sessions)
        if args.json:
            print(json.dumps(plan_document(request, args.sessions, args.efficiency), indent=1))
        else:
            from rich.console import Console

            Console().print(*plan_tables(request, args.sessions, args.efficiency), sep="\n")
            if memory.fits is False:  # the last word, too: the tables are longer than a screen
                Console().print(memory.verdict, style="red", markup=False)
        return 1 if memory.fits is False else 0


class Inspect(Command):
    """Show what a bundle holds: components, engines, kernels, quantization, memory, sparsity, provenance, verdict.

    Launches, matrix products and activation memory are what each engine's own plan says. Files are verified first.
    """

    name = "inspect"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("bundle", type=Path, help="folder of the bundle")
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        from export.report.bundle import inspect_bundle

        inspect_bundle(args.bundle, as_json=args.json)
        return 0


class Compare(Command):
    """Compare a bundle with the reference model, with another bundle, or its model's precisions with one another.

    Per component, per step and over a whole rollout; `--report` writes a page with curves and frames. Exit code 1
    where a result is past its tolerance.
    """

    name = "compare"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("bundle", type=Path, help="folder of the bundle")
        against = parser.add_mutually_exclusive_group()
        against.add_argument(
            "--with",
            dest="other",
            type=Path,
            metavar="BUNDLE",
            help="compare with this bundle, which counts as right",
        )
        against.add_argument(
            "--precisions",
            type=precisions,
            metavar="LIST",
            help="what bf16, fp8, nvfp4 cost, e.g. bf16,fp8; runs on any machine, whatever the bundle's target",
        )
        parser.add_argument("--chunks", type=positive, default=3, help="length of the rollout (default: 3)")
        parser.add_argument(
            "--tolerance", type=tolerance, help="largest relative L2 error (default: the precision's)"
        )
        parser.add_argument("--json", type=output, metavar="FILE", help="also write table and curves as JSON")
        parser.add_argument(
            "--report", type=output, metavar="FILE", help="also write an HTML page with curves and frames"
        )
        files = parser.add_argument_group(
            "the files the bundle was built from, unless its weights are random"
        )
        add_transformer_files(files)
        add_decoder_and_text_files(files)

    def run(self, args: argparse.Namespace) -> int:
        check_sources(args)
        if args.other is not None and args.checkpoint:
            raise InputError(
                "--with compares two bundles and needs no weights; drop --checkpoint and the like"
            )
        comparison = _comparison(args)

        from rich.console import Console

        from export.compare.result import comparison_table

        Console().print(comparison_table(comparison.title, comparison.rows))
        if args.json is not None:
            comparison.write_json(args.json)
        if args.report is not None:
            from export.compare.report import write_report

            write_report(comparison, args.report)
        return 0 if comparison.passed else 1


def _comparison(args: argparse.Namespace) -> Comparison:
    """What `compare` was asked for."""
    if args.other is not None:
        from export.compare.against_bundle import against_bundle

        return against_bundle(args.bundle, args.other, chunks=args.chunks, tolerance=args.tolerance)
    reference = _reference(args) if args.checkpoint else None
    if args.precisions is not None:
        from export.compare.against_precisions import compare_precisions

        return compare_precisions(
            args.bundle, args.precisions, chunks=args.chunks, tolerance=args.tolerance, reference=reference
        )
    from export.compare.against_reference import against_reference

    return against_reference(args.bundle, chunks=args.chunks, tolerance=args.tolerance, reference=reference)


def precisions(text: str) -> list[str]:
    names = text.split(",")
    known = ("bf16", "fp8", "nvfp4")
    for name in names:
        if name not in known:
            note = "; float32 is what they are compared with" if name == "fp32" else ""
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}{note}")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text} names a precision twice")
    return names


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
            print(json.dumps(report.as_dict(), indent=1))
        else:
            from rich.console import Console

            from export.report.targets import doctor_tables

            Console().print(*doctor_tables(report))
        return 1 if report.problems else 0


def efficiency(text: str) -> float:
    value = 1.0 if text == "1" else fraction(text)
    if not value:
        raise argparse.ArgumentTypeError(f"{text} is outside (0, 1]")
    return value


def _planned(args: argparse.Namespace) -> PlanRequest:
    """Check the arguments of `plan`."""
    from export.report.plan import PlanRequest, planned_precision

    target, variant = chosen_variant(args)
    precision = planned_precision(target, args.precision)

    from lightforcing_ref.config import preset

    model = preset(args.preset)
    height, width = args.resolution or (model.height, model.width)
    return PlanRequest(target, variant, model, height, width, precision)


def _reference(args: argparse.Namespace) -> Reference:
    """The reference model of a bundle that was built from files."""
    from export.compare.reference import Reference
    from export.request.weights import Weights
    from lightforcing_ref.config import preset
    from runtime.bundle import load_bundle

    manifest = load_bundle(args.bundle, verify=False).manifest
    weights = Weights(
        preset(manifest.model.preset),
        checkpoint=args.checkpoint,
        lora=args.lora,
        vae=args.vae,
        text_encoder=args.text_encoder,
        tokenizer=args.tokenizer,
    )
    return Reference.from_files(manifest, weights)
