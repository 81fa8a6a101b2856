"""The command `compare`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.errors import InputError
from runtime.terminal import console

from .command import Command, output, policies, positive, seed, tolerance
from .sources import (
    add_decoder_and_text_files,
    add_transformer_files,
    check_sources,
    fetch_sources,
    fill_model,
    merged_loras,
)

if TYPE_CHECKING:
    from export.compare.reference import Reference
    from export.compare.result import Comparison

__all__ = ["Compare", "reference_of"]


class Compare(Command):
    """Compare a bundle with the reference model or another bundle, or its model's precisions or methods of selection.

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
        against.add_argument(
            "--policies",
            type=policies,
            metavar="LIST",
            help="what methods of selection cost against full attention, e.g. hsa,sta,vmoba, or all; on any machine",
        )
        parser.add_argument(
            "--prompt",
            action="append",
            default=[],
            metavar="TEXT",
            help="what is played; repeatable (default: a prompt that the weights can show something for)",
        )
        parser.add_argument("--seed", dest="noise_seed", type=seed, help="of the noise (default: 3)")
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
        reference = reference_of(args)
        if args.other is not None and args.checkpoint:
            raise InputError(
                "--with compares two bundles and needs no weights; drop --checkpoint and the like"
            )
        comparison = _comparison(args, reference)
        if args.policies is None:
            from export.compare.result import comparison_table

            console().print(comparison_table(comparison.title, comparison.rows))
        if args.json is not None:
            comparison.write_json(args.json)
        if args.report is not None:
            from export.compare.report import write_report

            write_report(comparison, args.report)
        return 0 if comparison.passed else 1


def _comparison(args: argparse.Namespace, reference: Reference | None) -> Comparison:
    """What `compare` was asked for."""
    played: dict[str, Any] = {
        "chunks": args.chunks,
        "prompts": args.prompt,
        "seed": args.noise_seed,
        "tolerance": args.tolerance,
    }
    if args.other is not None:
        from export.compare.against_bundle import against_bundle

        return against_bundle(args.bundle, args.other, **played)
    if args.policies is not None:
        return _policies(args, reference)
    if args.precisions is not None:
        from export.compare.against_precisions import compare_precisions

        return compare_precisions(args.bundle, args.precisions, reference=reference, **played)
    from export.compare.against_reference import against_reference

    return against_reference(args.bundle, reference=reference, **played)


def _policies(args: argparse.Namespace, reference: Reference | None) -> Comparison:
    """Methods of selection; prints their table."""
    from export.compare.against_policies import compare_policies, policy_table
    from export.estimate.roofline import predict
    from export.request.plan import PlanRequest, planned_precision
    from export.request.targets import Variant, load_target
    from lightforcing_ref.config import preset
    from runtime.bundle import load_bundle

    manifest = load_bundle(args.bundle, verify=False).manifest
    model, target = manifest.model, load_target(manifest.target.name)
    asked = manifest.precision if manifest.precision in target.precisions else None

    def predicted(variant: Variant) -> float | None:
        request = PlanRequest(
            target,
            variant,
            preset(model.preset),
            model.video_height,
            model.video_width,
            planned_precision(target, asked),
        )
        clip = predict(request)
        return None if clip is None else clip.seconds

    results, comparison = compare_policies(
        args.bundle, args.policies, chunks=args.chunks, predicted=predicted, reference=reference
    )
    console().print(policy_table(results, comparison.title))
    return comparison


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


def reference_of(args: argparse.Namespace) -> Reference | None:
    """The reference model of a bundle that was built from files; None where no files are given."""
    args.known = fill_model(args)
    check_sources(args)
    if not args.checkpoint or getattr(args, "other", None) is not None:
        return None

    from export.compare.reference import Reference
    from export.request.weights import Weights
    from lightforcing_ref.config import preset
    from runtime.bundle import load_bundle

    manifest = load_bundle(args.bundle, verify=False).manifest
    fetch_sources(args, args.known)
    weights = Weights(
        preset(manifest.model.preset),
        checkpoint=args.checkpoint,
        section=getattr(manifest.provenance.checkpoint, "section", None),
        loras=merged_loras(args),
        vae=args.vae,
        text_encoder=args.text_encoder,
        tokenizer=args.tokenizer,
        any_values=args.allow_values,
    )
    return Reference.from_files(manifest, weights)
