"""The commands that build: `build`, `onnx`."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING

from .command import (
    Command,
    add_decoder_and_text_files,
    add_model_arguments,
    bundle_name,
    check_sources,
)

if TYPE_CHECKING:
    from .backends import BackendChoice
    from .request import BuildRequest
    from .targets import Variant

__all__ = ["Build", "Onnx", "build_request"]


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
            default="whole",
            help="the step as one graph, or cut at its operators with weights as inputs (default: whole)",
        )
        parser.add_argument("--name", type=bundle_name, help="of the bundle (default: TARGET-PRESET-VARIANT)")

    def run(self, args: argparse.Namespace) -> int:
        from rich.console import Console
        from rich.markup import escape

        from .build import build_bundle
        from .progress import progress_bars

        request, choice = build_request(args)
        console = Console()
        console.print(
            f"[bold]{request.name}[/]: {choice.backend} in {choice.precision} ({escape(choice.reason)})"
        )
        with progress_bars(console) as progress:
            folder = build_bundle(request, progress)
        console.print(f"built {folder}; try:", markup=False, soft_wrap=True)
        command = f"python -m runtime generate {shlex.quote(str(folder))} --prompt 'a red fox in snow' --out clip.mp4"
        console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)
        return 0


class Onnx(Command):
    """Export the step graph to ONNX and stop there."""

    name = "onnx"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_model_arguments(parser)

    def run(self, args: argparse.Namespace) -> int:
        from .build import export_onnx

        request, _ = build_request(args)
        print(export_onnx(request))
        return 0


def build_request(args: argparse.Namespace) -> tuple[BuildRequest, BackendChoice]:
    """Check everything about the request that can be known before the work starts."""
    from .backends import choose_backend
    from .targets import load_target, load_variant

    target = load_target(args.gpu)
    variant = _variant(args, load_variant(args.variant or target.default_variant))
    choice = choose_backend(target, getattr(args, "backend", "auto"), getattr(args, "precision", None))
    check_sources(args)

    from lightforcing_ref.config import preset

    from .request import BuildRequest
    from .weights import Weights

    model = preset(args.preset)
    height, width = args.resolution or (model.height, model.width)
    request = BuildRequest(
        target=target,
        variant=variant,
        preset=model,
        height=height,
        width=width,
        backend=choice.backend,
        precision=choice.precision,
        files=Weights(
            model,
            seed=None if args.checkpoint else args.seed or 0,
            checkpoint=args.checkpoint,
            lora=args.lora,
            vae=getattr(args, "vae", None),
            text_encoder=getattr(args, "text_encoder", None),
            tokenizer=getattr(args, "tokenizer", None),
        ),
        per_chunk=args.per_chunk,
        execution=getattr(args, "execution", "whole"),
        out=args.out,
        name=getattr(args, "name", None) or f"{target.name}-{model.name}-{variant.name}",
        command=args.command_line,
    )
    return request, choice


def _variant(args: argparse.Namespace, variant: Variant) -> Variant:
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
    return changed
