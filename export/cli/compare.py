"""The command `compare`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from export.errors import InputError
from runtime.terminal import console

from .command import Command, output, positive, tolerance
from .sources import (
    add_decoder_and_text_files,
    add_transformer_files,
    check_sources,
    fetch_sources,
    fill_model,
)

if TYPE_CHECKING:
    from export.compare.reference import Reference
    from export.compare.result import Comparison

__all__ = ["Compare"]


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
        args.known = fill_model(args)
        check_sources(args)
        if args.other is not None and args.checkpoint:
            raise InputError(
                "--with compares two bundles and needs no weights; drop --checkpoint and the like"
            )
        comparison = _comparison(args)

        from export.compare.result import comparison_table

        console().print(comparison_table(comparison.title, comparison.rows))
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


def _reference(args: argparse.Namespace) -> Reference:
    """The reference model of a bundle that was built from files."""
    from export.compare.reference import Reference
    from export.request.weights import Weights
    from lightforcing_ref.config import preset
    from runtime.bundle import load_bundle

    manifest = load_bundle(args.bundle, verify=False).manifest
    fetch_sources(args, args.known)
    weights = Weights(
        preset(manifest.model.preset),
        checkpoint=args.checkpoint,
        lora=args.lora,
        vae=args.vae,
        text_encoder=args.text_encoder,
        tokenizer=args.tokenizer,
        any_values=args.allow_values,
    )
    return Reference.from_files(manifest, weights)
