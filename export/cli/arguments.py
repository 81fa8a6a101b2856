"""The commands that build: `build`, `onnx`."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING

from export.errors import InputError

from .command import (
    Command,
    add_decoder_and_text_files,
    add_model_arguments,
    bundle_name,
    check_sources,
    existing,
)

if TYPE_CHECKING:
    from export.request.capability import BackendChoice
    from export.request.request import BuildRequest
    from export.request.targets import Target, Variant
    from export.request.weights import Weights
    from lightforcing_ref.config import Preset

__all__ = ["Build", "Onnx", "build_request", "chosen_variant", "chosen_weights", "graph_request"]


class Build(Command):
    """Build a bundle: everything one target needs to run one variant of a model.

    The bundle appears complete or not at all. An interrupted build resumes when the same command runs again.
    """

    name = "build"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_model_arguments(parser)
        add_decoder_and_text_files(parser)
        parser.add_argument(
            "--precision", metavar="NAME", help="fp32, bf16, fp8 or nvfp4 (default: the backend's)"
        )
        parser.add_argument(
            "--backend", default="auto", metavar="NAME", help="onnxruntime, tensorrt-rtx, ... (default: auto)"
        )
        parser.add_argument(
            "--execution",
            choices=("whole", "segmented"),
            help="the step as one graph, or cut at its operators (default: what the backend can)",
        )
        parser.add_argument(
            "--weights",
            choices=("inputs", "embedded"),
            default="inputs",
            help="segments take their weights as inputs, one engine for all layers, or hold them, an engine per layer "
            "(default: inputs)",
        )
        quantized = parser.add_argument_group("quantization, for fp8 and nvfp4")
        quantized.add_argument(
            "--fp8-activations",
            choices=("dynamic", "static"),
            default="dynamic",
            help="a scale per token, or calibrated ones (default: dynamic)",
        )
        quantized.add_argument(
            "--calibration", type=existing, metavar="FILE", help="ranges and errors, from `calibrate`"
        )
        quantized.add_argument(
            "--skip",
            action="append",
            default=[],
            metavar="PATTERN",
            help="linears to leave in bf16, such as '*.ffn.2'; or auto, for those that lose too much; repeatable",
        )
        parser.add_argument(
            "--name",
            type=bundle_name,
            help="of the bundle (default: TARGET-PRESET-VARIANT, with the precision if it is reduced)",
        )

    def run(self, args: argparse.Namespace) -> int:
        from rich.console import Console
        from rich.markup import escape

        from export.build import build_bundle, check_build
        from export.estimate.memory import plan_memory
        from export.progress import progress_bars
        from export.report.engines import engine_table
        from export.report.plan import memory_table
        from runtime.bundle import load_bundle

        request, choice = build_request(args)
        check_build(request)
        console = Console()
        console.print(
            f"[bold]{request.name}[/]: {choice.backend} in {choice.precision} ({escape(choice.reason)})"
        )
        console.print(f"weights: {request.weights.described}", markup=False, soft_wrap=True)
        console.print(memory_table(plan_memory(request)))
        with progress_bars(console) as progress:
            folder = build_bundle(request, progress)
        manifest = load_bundle(folder, verify=False).manifest
        if manifest.library is not None:
            console.print(engine_table(manifest))
        console.print(f"built {folder} (status: {manifest.status}); try:", markup=False, soft_wrap=True)
        on_device = manifest.target.compute_capability is not None
        for command in _next_commands(str(folder), request.weights.example_prompt, on_device=on_device):
            console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)
        return 0


def _next_commands(folder: str, prompt: str, *, on_device: bool) -> list[str]:
    folder, prompt = shlex.quote(folder), shlex.quote(prompt)
    generate = f"python -m runtime generate {folder} --prompt {prompt} --out clip.mp4"
    if not on_device:
        return [generate]
    return [f"python -m runtime verify --dry-run {folder}", f"{generate}   (on the target)"]


class Onnx(Command):
    """Export the step graph to ONNX and stop there.

    In the type of the target's bundles before anything is quantized: float32 where they run on ONNX Runtime, else
    bfloat16.
    """

    name = "onnx"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_model_arguments(parser)

    def run(self, args: argparse.Namespace) -> int:
        from export.build import export_onnx

        print(export_onnx(graph_request(args)))
        return 0


def graph_request(args: argparse.Namespace) -> BuildRequest:
    """The request of `onnx`: quantization comes after the graph that it exports, which is not called after it."""
    request, choice = build_request(args)
    if choice.precision in ("fp32", "bf16"):
        return request
    return replace(request, precision="bf16", name=f"{request.name.removesuffix(choice.precision)}bf16")


def build_request(args: argparse.Namespace) -> tuple[BuildRequest, BackendChoice]:
    """Check everything about the request that can be known before the work starts."""
    from export.request.capability import BACKENDS, choose_backend

    target, variant = chosen_variant(args)
    choice = choose_backend(target, getattr(args, "backend", "auto"), getattr(args, "precision", None))
    ways = BACKENDS[choice.backend].execution
    execution = getattr(args, "execution", None) or ways[0]
    if execution not in ways:
        raise InputError(
            f"{choice.backend} executes the step {ways[0]} only, not {execution}; drop --execution, or choose another "
            "--backend"
        )
    embedded = getattr(args, "weights", "inputs") == "embedded"
    if embedded and execution == "whole":
        raise InputError("--weights embedded is about segments; a whole graph always holds its weights")
    check_sources(args)

    from export.request.request import BuildRequest, QuantizationRequest
    from lightforcing_ref.config import preset

    model = preset(args.preset)
    height, width = args.resolution or (model.height, model.width)
    suffix = "" if choice.precision == "fp32" else f"-{choice.precision}"
    request = BuildRequest(
        target=target,
        variant=variant,
        weights=chosen_weights(args, model, variant),
        height=height,
        width=width,
        backend=choice.backend,
        precision=choice.precision,
        per_chunk=args.per_chunk,
        execution=execution,
        embedded=embedded,
        quantization=QuantizationRequest(
            static=getattr(args, "fp8_activations", "dynamic") == "static",
            calibration=getattr(args, "calibration", None),
            skip=tuple(getattr(args, "skip", ())),
        ),
        out=args.out,
        name=getattr(args, "name", None) or f"{target.name}-{model.name}-{variant.name}{suffix}",
        command=args.command_line,
    )
    return request, choice


def chosen_weights(args: argparse.Namespace, model: Preset, variant: Variant) -> Weights:
    """Where the weights come from: files, what the package ships, or a seed."""
    from export.request.weights import Weights, shipped_weights

    if args.checkpoint:
        return Weights(
            model,
            checkpoint=args.checkpoint,
            lora=args.lora,
            vae=getattr(args, "vae", None),
            text_encoder=getattr(args, "text_encoder", None),
            tokenizer=getattr(args, "tokenizer", None),
        )
    if not args.init and args.seed is None:
        shipped = shipped_weights(model, dense=not variant.sparsity.target)
        if shipped is not None:
            return shipped
    return Weights(model, seed=args.seed or 0)


def chosen_variant(args: argparse.Namespace) -> tuple[Target, Variant]:
    """The target, and the variant with the command line's changes."""
    from export.request.targets import load_target, load_variant

    target = load_target(args.gpu)
    variant = load_variant(args.variant or target.default_variant)
    changed = variant.changed(
        target=args.sparsity,
        base=args.sparsity_base,
        keep_frames=args.keep_frames,
        sink_frames=args.sink,
        near_frames=args.near,
        window_frames=args.window,
        table_frames=args.table_frames,
    )
    changed.table()
    return target, changed
