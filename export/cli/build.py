"""The command `build`."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from runtime.terminal import console

from .arguments import build_request
from .command import Command, add_model_arguments, bundle_name, existing, tolerance
from .sources import add_decoder_and_text_files

if TYPE_CHECKING:
    from export.request.request import BuildRequest

__all__ = ["Build"]


class Build(Command):
    """Build a bundle: everything one target needs to run one variant of a model.

    The bundle appears complete or not at all. An interrupted build resumes when the same command runs again.
    """

    name = "build"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_model_arguments(parser)
        add_decoder_and_text_files(parser)
        parser.add_argument(
            "--precision",
            metavar="NAME",
            help="fp32, bf16, fp8 or nvfp4 (default: the backend's); auto: of the last three the one for each linear "
            "that gives the least time within --error-budget",
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
        parser.add_argument(
            "--with-encoder",
            action="store_true",
            help="add the video encoder, so that a session can start from an image or a video",
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
            help="linears to leave in bf16, such as '*.ffn.2', or in fp8: '*.ffn.2=fp8'; auto: those that lose too "
            "much; repeatable",
        )
        quantized.add_argument(
            "--error-budget",
            type=tolerance,
            metavar="X",
            help="with --precision auto and --calibration: relative error that a forward's output may have, "
            "such as 0.05",
        )
        parser.add_argument(
            "--name",
            type=bundle_name,
            help="of the bundle (default: TARGET-PRESET-VARIANT, with a precision that is reduced and a backend that "
            "is not the target's first)",
        )

    def run(self, args: argparse.Namespace) -> int:
        from rich.markup import escape

        from export.build import build_bundle, check_build
        from export.progress import progress_bars
        from export.report.built import built_lines
        from export.report.engines import engine_table
        from export.report.formats import search_table
        from export.report.plan import memory_table
        from runtime.bundle import load_bundle

        request, choice = build_request(args)
        checked = check_build(request)
        shown = console()
        shown.print(
            f"[bold]{request.name}[/]: {choice.backend} in {choice.precision} ({escape(choice.reason)})"
        )
        shown.print(f"weights: {request.weights.described}", markup=False, soft_wrap=True)
        if request.quantization.search is not None:
            shown.print(search_table(request.quantization.search))
        shown.print(memory_table(checked.memory))
        started = time.monotonic()
        with _kept(request), progress_bars(shown) as progress:
            folder = build_bundle(checked, progress)
        manifest = load_bundle(folder, verify=False).manifest
        if manifest.library is not None:
            shown.print(engine_table(manifest))
        for line in built_lines(folder, manifest, request.target.title, time.monotonic() - started):
            shown.print(line, markup=False, highlight=False, soft_wrap=True)
        shown.print("next:")
        on_device = manifest.target.compute_capability is not None
        for command in _next_commands(str(folder), request.weights.example_prompt, on_device=on_device):
            shown.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)
        return 0


@contextmanager
def _kept(request: BuildRequest) -> Iterator[None]:
    """Note on whatever ends a build what it leaves behind."""
    from export.parts.workspace import partial_folder
    from export.units import readable_size

    try:
        yield
    except BaseException as error:
        folder = partial_folder(request.out, request.name)
        if folder.is_dir():
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            error.add_note(
                f"finished parts are kept in {folder} ({readable_size(size)}): the same command resumes from there, "
                "and removing the folder gives the room back"
            )
        raise


def _next_commands(folder: str, prompt: str, *, on_device: bool) -> list[str]:
    folder, prompt = shlex.quote(folder), shlex.quote(prompt)
    generate = f"python -m runtime generate {folder} --prompt {prompt} --out clip.mp4"
    if not on_device:
        return [generate, f"python -m runtime verify {folder}"]
    return [
        f"python -m runtime verify --dry-run {folder}",
        f"python -m runtime verify {folder}   (on the target)",
        f"{generate}   (on the target)",
    ]
