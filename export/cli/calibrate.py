"""The command `calibrate`: ranges and errors of the block linears over rollouts, for builds to take up."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.terminal import console

from .arguments import chosen_variant, chosen_weights
from .command import Command, add_source_arguments, existing, output, positive
from .sources import add_text_files, check_sources

if TYPE_CHECKING:
    from rich.table import Table

    from export.quantize.calibration import Calibration, Measured
    from export.quantize.numerics import Format
    from export.request.geometry import StepPlan
    from export.request.weights import Weights

__all__ = ["Calibrate", "measure"]

DEFAULT_FILE = Path("calibration.json")


class Calibrate(Command):
    """Observe the transformer over rollouts, and save what quantization needs to know.

    Every prompt is rolled out for some chunks with all timesteps of each. The file holds the range of every
    linear's input, and what each format costs; `build --calibration FILE` takes it up, for this model only.
    """

    name = "calibrate"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_source_arguments(parser)
        add_text_files(parser)
        parser.add_argument(
            "--prompts",
            type=existing,
            required=True,
            metavar="FILE",
            help="text file with a prompt on each line",
        )
        parser.add_argument(
            "--chunks",
            type=positive,
            default=3,
            help="length of each rollout; from the second on there is a cache (3)",
        )
        parser.add_argument(
            "--out", type=output, default=DEFAULT_FILE, metavar="FILE", help=f"(default: {DEFAULT_FILE})"
        )

    def run(self, args: argparse.Namespace) -> int:
        target, variant = chosen_variant(args)
        check_sources(args)

        from export.quantize.calibration import modelopt_quantization
        from export.quantize.trial import read_prompts
        from export.request.geometry import StepPlan
        from export.request.methods import resolved
        from lightforcing_ref.config import preset

        model = preset(args.preset)
        height, width = args.resolution or (model.height, model.width)
        blocks = variant.blocks(target, model.block)
        weights, prompts = chosen_weights(args, model, variant), read_prompts(args.prompts)
        method = resolved(variant.attention, kernels=False, linear=weights.transformer.linear_branch)
        variant = variant.model_copy(update={"attention": method})
        plan = StepPlan.of(model, variant, height, width, block_q=blocks.query, block_k=blocks.key)
        modelopt_quantization()  # refuse what cannot be done before any long work
        shown = console()
        shown.print(f"weights: {weights.described}", markup=False, soft_wrap=True)
        with shown.status("starting") as status:
            calibration = measure(weights, plan, prompts, chunks=args.chunks, progress=status.update)
        calibration.save(args.out)
        shown.print(_table(calibration))
        shown.print(
            f"wrote {args.out} ({len(prompts)} prompts, {args.chunks} chunks); use it with --calibration",
            markup=False,
            soft_wrap=True,
        )
        return 0


def measure(
    weights: Weights,
    plan: StepPlan,
    prompts: list[str],
    *,
    chunks: int,
    progress: Callable[[str], None] = lambda stage: None,
) -> Calibration:
    """Ranges of the linears' inputs, and the errors of every format, over rollouts of the reference model.

    Raises:
        InputError: ModelOpt is not installed, or a linear sees nothing but zeros or non-finite values.
    """
    import torch

    from export.graph.modules import merge_qkv
    from export.quantize.calibration import ALL, calibrate
    from export.quantize.cost import latent_error, layer_errors, output_errors
    from export.quantize.decision import block_linear_names, weights_identity
    from export.quantize.formats import choose_formats
    from export.quantize.graph import KINDS, is_block_linear
    from export.quantize.trial import Trial, embed_prompts

    progress("embedding the prompts")
    trial = Trial(plan, tuple(embed_prompts(weights, prompts)), chunks=chunks)
    progress("observing the inputs of every linear")
    model = weights.dit(torch.float32)
    merge_qkv(model)
    calibration = calibrate(model, trial, weights=weights_identity(weights))
    progress("comparing every linear in every format")
    model = weights.dit(torch.float32)  # the first one is left with fake quantization
    merge_qkv(model)
    dynamic = layer_errors(model, trial, ("fp8", "nvfp4"), importance=calibration.importance)
    static = layer_errors(model, trial, ("fp8",), amax=calibration.amax)
    errors: dict[str, dict[Measured, float]] = {
        name: {"fp8": found["fp8"], "fp8_static": static[name]["fp8"], "nvfp4": found["nvfp4"]}
        for name, found in dynamic.items()
    }
    names = block_linear_names(plan.preset.dit.layers)
    latents: dict[Measured, float] = {}
    progress("comparing every forward with one kind of linears in each format")
    formats: tuple[Format, ...] = ("fp8", "nvfp4")
    options = {
        (kind, format): {name: format for name in names if kind in (is_block_linear(name), ALL)}
        for kind in (*KINDS, ALL)
        for format in formats
    }
    outputs = output_errors(model, trial, options, importance=calibration.importance)
    progress("comparing the latents after whole rollouts")
    latents["fp8"] = latent_error(model, trial, choose_formats(names, "fp8")).total
    latents["fp8_static"] = latent_error(
        model, trial, choose_formats(names, "fp8"), amax=calibration.amax
    ).total
    latents["nvfp4"] = latent_error(
        model, trial, choose_formats(names, "nvfp4"), importance=calibration.importance
    ).total
    return calibration.model_copy(
        update={
            "errors": errors,
            "latent_errors": latents,
            "output_errors": {kind: {f: outputs[kind, f] for f in formats} for kind in (*KINDS, ALL)},
        }
    )


def _table(calibration: Calibration) -> Table:
    from rich import box
    from rich.table import Table

    from export.quantize.calibration import ALL
    from export.quantize.graph import KINDS, is_block_linear

    columns: tuple[Measured, ...] = ("fp8", "fp8_static", "nvfp4")
    table = Table("", *columns, "output, fp8", "output, nvfp4", box=box.SIMPLE_HEAD)
    table.caption = (
        "relative L2 errors: of the worst layer's own output; of what the model predicts where all linears of a kind "
        "(last line: all at all) are in a format"
    )
    for kind in KINDS:
        rows = [found for name, found in calibration.errors.items() if is_block_linear(name) == kind]
        own = (f"{max(row[column] for row in rows):.3f}" for column in columns)
        table.add_row(kind, *own, *_outputs(calibration, kind))
    latents = (f"{calibration.latent_errors[column]:.4f}" for column in columns)
    table.add_row("latents of rollouts", *latents, *_outputs(calibration, ALL))
    return table


def _outputs(calibration: Calibration, kind: str) -> tuple[str, str]:
    found = calibration.output_errors[kind]
    return f"{found['fp8']:.4f}", f"{found['nvfp4']:.4f}"
