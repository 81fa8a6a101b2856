"""The command `plan`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from export.errors import InputError
from runtime.terminal import console, write_out

from .arguments import chosen_preset, chosen_variant
from .command import Command, add_model_arguments, fraction, policies, positive

if TYPE_CHECKING:
    from export.request.plan import PlanRequest


__all__ = ["Plan"]


class Plan(Command):
    """Plan a bundle without building it: memory, checked against the target's, and the predicted floor per chunk.

    Takes the arguments of `build` on model, variant and target. Nothing is measured: times follow from sizes and
    published peak rates, and real ones are longer; how much longer, --measured tells. Exit code 1 where the plan does
    not fit into the target's memory.
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
            "--skip",
            action="append",
            default=[],
            metavar="PATTERN",
            help="linears in bf16, such as '*.ffn.2', or in fp8: '*.ffn.2=fp8', as `build` takes it; repeatable",
        )
        parser.add_argument(
            "--sessions", type=positive, default=1, metavar="N", help="concurrent rollouts (default: 1)"
        )
        share = parser.add_mutually_exclusive_group()
        share.add_argument(
            "--efficiency",
            type=efficiency,
            default=0.6,
            metavar="E",
            help="share of the peak rates that the second column assumes (default: 0.6)",
        )
        share.add_argument(
            "--measured",
            type=Path,
            metavar="FILE",
            help="what `python -m runtime bench BUNDLE --json FILE` measured on this GPU: the second column is as far "
            "from the floor as that was",
        )
        parser.add_argument(
            "--bundle",
            type=Path,
            metavar="BUNDLE",
            help="count element-wise work as the engines of this built bundle do it, not pass by pass",
        )
        parser.add_argument(
            "--layer",
            action="store_true",
            help="print what one layer of --bundle launches and moves, launch by launch, and nothing else",
        )
        parser.add_argument(
            "--all", action="store_true", help="every GPU in one table; --gpu is not looked at"
        )
        parser.add_argument(
            "--policies",
            type=policies,
            metavar="LIST",
            help="methods of selection in one table, e.g. hsa,sta, or all; --gpu may name several GPUs then: a,b",
        )
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, args: argparse.Namespace) -> int:
        from export.estimate.efficiency import assumed, measured
        from export.estimate.memory import plan_memory
        from export.report.plan import plan_document, plan_tables

        if args.all and args.policies:
            raise InputError("--all compares GPUs, --policies methods; drop one of them")
        if args.layer and args.bundle is None:
            raise InputError("--layer is about a built bundle; name it with --bundle")
        if args.all:
            return _every_card(args)
        if args.policies:
            return _every_policy(args)
        request = _planned(args)
        if args.layer:
            return _one_layer(args, request)
        share = measured(args.measured, request.target) if args.measured else assumed(args.efficiency)
        memory, built = plan_memory(request, args.sessions), None
        if args.bundle:
            from export.estimate.built import built_traffic, matching_bundle

            built = built_traffic(matching_bundle(args.bundle, request))
        if args.json:
            document = plan_document(request, args.sessions, share, built)
            write_out(json.dumps(document, indent=1) + "\n")
        else:
            console().print(*plan_tables(request, args.sessions, share, built), sep="\n")
            if memory.fits is False:  # the last word, too: the tables are longer than a screen
                console().print(memory.verdict, style="red", markup=False)
        return 1 if memory.fits is False else 0


def _one_layer(args: argparse.Namespace, request: PlanRequest) -> int:
    from export.estimate.built import matching_bundle
    from export.estimate.layer import layer_launches
    from export.estimate.roofline import Workload
    from export.report.layer import layer_document, layer_table

    peak, workload = request.target.peak, Workload(request)
    if peak is None:
        raise InputError(
            f"no peak rates of {request.target.title} are known, which --layer needs; leave it out"
        )
    chunk = workload.planned_chunks - 1
    launches = layer_launches(matching_bundle(args.bundle, request), workload, chunk)
    if args.json:
        write_out(json.dumps(layer_document(launches, peak), indent=1) + "\n")
    else:
        console().print(layer_table(launches, peak, chunk))
    return 0


def _every_card(args: argparse.Namespace) -> int:
    from export.estimate.efficiency import assumed
    from export.report.cards import Card, cards_document, cards_table
    from export.request.methods import multiplies_e4m3
    from export.request.targets import list_targets

    if args.measured or args.bundle:
        raise InputError("--all is about every GPU, --measured and --bundle about one; drop one of them")
    share = assumed(args.efficiency)
    cards: list[Card] = []
    for target in list_targets():
        if target.compute_capability is None:
            continue
        args.gpu = target.name
        able = args.precision is None or args.precision in target.precisions
        able = able and (args.attention != "fp8" or multiplies_e4m3(target))
        cards.append((target, _planned(args) if able else None))
    if args.json:
        write_out(json.dumps(cards_document(cards, args.sessions, share), indent=1) + "\n")
    else:
        console().print(cards_table(cards, args.sessions, share))
    return 0


def _every_policy(args: argparse.Namespace) -> int:
    from export.estimate.efficiency import assumed
    from export.report.policies import policies_document, policies_table
    from export.request.targets import load_target

    if args.measured or args.bundle:
        raise InputError("--measured and --bundle are about one method; drop them, or --policies")
    targets = [load_target(name) for name in args.gpu.split(",")]
    args.gpu = targets[0].name
    request, share = _planned(args), assumed(args.efficiency)
    if args.json:
        document = policies_document(request, targets, args.policies, share)
        write_out(json.dumps(document, indent=1) + "\n")
    else:
        console().print(policies_table(request, targets, args.policies, share))
    return 0


def efficiency(text: str) -> float:
    value = 1.0 if text == "1" else fraction(text)
    if not value:
        raise argparse.ArgumentTypeError(f"{text} is outside (0, 1]")
    return value


def _planned(args: argparse.Namespace) -> PlanRequest:
    """Check the arguments of `plan`."""
    from export.request.methods import check_products
    from export.request.plan import PlanRequest, planned_precision

    target, variant = chosen_variant(args)
    check_products(target, variant)
    precision = planned_precision(target, args.precision)

    model = chosen_preset(args)
    height, width = args.resolution or (model.height, model.width)
    return PlanRequest(target, variant, model, height, width, precision, skip=tuple(args.skip))
