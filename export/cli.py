"""Command line of the export tools: arguments, validation at the door, dispatch. `python -m export --help`.

Exit codes: 0 done, 1 a comparison or check failed, 2 bad input (one line on stderr; `--debug` shows the traceback),
130 interrupted. Nothing heavy is imported before the arguments are known to be good.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NoReturn

from .errors import InputError

if TYPE_CHECKING:
    from .backends import BackendChoice
    from .build import BuildRequest
    from .reference import Reference
    from .targets import Variant

__all__ = ["COMMANDS", "Command", "main"]

DEFAULT_OUT = Path("engines/built")
PIXELS_PER_TOKEN = 16
"""A video's height and width are multiples of this: 8 pixels per latent pixel, 2 latent pixels per token."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class _Parser(argparse.ArgumentParser):
    """Reports a bad command line as one line, like every other bad input."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see '{self.prog} --help'")


class Command(ABC):
    """One sub-command. Its docstring is its help; the first line is its summary."""

    name: ClassVar[str]

    @abstractmethod
    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""

    @abstractmethod
    def run(self, args: argparse.Namespace) -> int:
        """Do the work and return the exit code."""


class Build(Command):
    """Build a bundle: everything one target needs to run one variant of a model.

    The bundle appears complete or not at all. An interrupted build resumes when the same command runs again.
    """

    name = "build"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        _add_model_arguments(parser)
        _add_decoder_and_text_files(parser)
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
        parser.add_argument(
            "--name", type=_bundle_name, help="of the bundle (default: TARGET-PRESET-VARIANT)"
        )

    def run(self, args: argparse.Namespace) -> int:
        from rich.console import Console
        from rich.markup import escape

        from .build import build_bundle
        from .progress import progress_bars

        request, choice = _request(args)
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
        _add_model_arguments(parser)

    def run(self, args: argparse.Namespace) -> int:
        from .build import export_onnx

        request, _ = _request(args)
        print(export_onnx(request))
        return 0


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
        parser.add_argument("--chunks", type=_positive, default=3, help="length of the rollout (default: 3)")
        parser.add_argument(
            "--tolerance", type=_tolerance, help="largest relative L2 error (default: the precision's)"
        )
        parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
        files = parser.add_argument_group(
            "the files the bundle was built from, unless its weights are random"
        )
        _add_transformer_files(files)
        _add_decoder_and_text_files(files)

    def run(self, args: argparse.Namespace) -> int:
        _check_sources(args)
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


COMMANDS: tuple[Command, ...] = (Build(), Onnx(), Inspect(), Compare(), Targets(), Doctor())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        args = _parser().parse_args(arguments)
        args.command_line = shlex.join(["python", "-m", "export", *arguments])
        command: Command = args.command
        return command.run(args)
    except KeyboardInterrupt:
        print("interrupted; a build resumes when the same command runs again", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if "--debug" in arguments:
            raise
        print(
            f"error: {error}; install the export tools: pip install '.[cpu,text,video,export]'",
            file=sys.stderr,
        )
        return 2
    except Exception as error:
        if "--debug" in arguments or not isinstance(error, _expected()):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _expected() -> tuple[type[Exception], ...]:
    from lightforcing_ref.errors import LightForcingError as ReferenceError_
    from runtime.errors import LightForcingError as RuntimeError_

    from .errors import ExportError

    return ExportError, ReferenceError_, RuntimeError_, OSError


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m export", description="Checkpoint -> ONNX -> engines -> bundle.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        doc = inspect.getdoc(type(command)) or ""
        sub = commands.add_parser(
            command.name,
            help=doc.splitlines()[0].rstrip("."),
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(sub)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(command=command)
    return parser


def _add_transformer_files(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--checkpoint", type=_existing, metavar="FILE", help="weights of the transformer")
    parser.add_argument("--lora", type=_existing, metavar="FILE", help="LoRA to merge into the checkpoint")


def _add_decoder_and_text_files(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--vae", type=_existing, metavar="FILE", help="video decoder, e.g. lightvaew2_1.pth")
    parser.add_argument(
        "--text-encoder", type=_existing, metavar="PATH", help="UMT5 encoder, a file or a folder"
    )
    parser.add_argument("--tokenizer", type=_existing, metavar="PATH", help="tokenizer.json, or its folder")


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpu", default="cpu", metavar="TARGET", help="target name or TOML file (default: cpu)"
    )
    parser.add_argument("--preset", default="tiny", help="model size: tiny or wan-1.3b (default: tiny)")
    parser.add_argument("--init", choices=["random"], help="random weights instead of a checkpoint's")
    parser.add_argument("--seed", type=_seed, help="of the random weights (default: 0)")
    _add_transformer_files(parser)
    parser.add_argument(
        "--resolution", type=_resolution, metavar="HxW", help="of the video in pixels (default: the preset's)"
    )
    sparse = parser.add_argument_group("attention")
    sparse.add_argument("--variant", metavar="NAME", help="name or TOML file (default: the target's)")
    sparse.add_argument(
        "--sparsity", type=_fraction, metavar="S", help="average fraction of key blocks to skip"
    )
    sparse.add_argument(
        "--sparsity-base",
        type=_fraction,
        metavar="S",
        help="the fraction in the limit of a long history (default: --sparsity plus the variant's own distance)",
    )
    sparse.add_argument(
        "--keep-frames", type=_positive, metavar="N", help="past frames the first stage keeps"
    )
    sparse.add_argument("--sink", type=_natural, metavar="N", help="first frames that are always kept")
    sparse.add_argument("--near", type=_natural, metavar="N", help="latest frames that are always kept")
    sparse.add_argument("--window", type=_positive, metavar="N", help="latent frames attention may see")
    sparse.add_argument("--table-frames", type=_positive, metavar="N", help="planned latent frames of a clip")
    parser.add_argument("--per-chunk", action="store_true", help="also write a specialised graph per chunk")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"folder (default: {DEFAULT_OUT})")


def _request(args: argparse.Namespace) -> tuple[BuildRequest, BackendChoice]:
    """Check everything about the request that can be known before the work starts."""
    from .backends import choose_backend
    from .targets import load_target, load_variant

    target = load_target(args.gpu)
    variant = _variant(args, load_variant(args.variant or target.default_variant))
    choice = choose_backend(target, getattr(args, "backend", "auto"), getattr(args, "precision", None))
    _check_sources(args)

    from lightforcing_ref.config import preset

    from .build import BuildRequest

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
        seed=None if args.checkpoint else args.seed or 0,
        checkpoint=args.checkpoint,
        lora=args.lora,
        vae=getattr(args, "vae", None),
        text_encoder=getattr(args, "text_encoder", None),
        tokenizer=getattr(args, "tokenizer", None),
        per_chunk=args.per_chunk,
        execution=getattr(args, "execution", "whole"),
        out=args.out,
        name=getattr(args, "name", None) or f"{target.name}-{model.name}-{variant.name}",
        command=args.command_line,
    )
    return request, choice


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


def _check_sources(args: argparse.Namespace) -> None:
    """Weights come from files or from a seed, never partly from either."""
    files = {
        name: getattr(args, name)
        for name in ("checkpoint", "vae", "text_encoder", "tokenizer")
        if hasattr(args, name)
    }
    missing = [_flag(name) for name, path in files.items() if path is None]
    given = [_flag(name) for name, path in files.items() if path is not None]
    if given and (getattr(args, "init", None) or getattr(args, "seed", None) is not None):
        raise InputError(
            f"{given[0]} and random weights exclude each other; drop --init and --seed, or {given[0]}"
        )
    if given and missing:
        raise InputError(
            f"{', '.join(given)} without {', '.join(missing)}; give all of them, or none for random weights"
        )
    if args.lora and not args.checkpoint:
        raise InputError("--lora needs the --checkpoint it belongs to")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _fraction(text: str) -> float:
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is outside [0, 1)")
    return value


def _tolerance(text: str) -> float:
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 up")
    return int(text)


def _seed(text: str) -> int:
    if (value := _natural(text)) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text} is too large; expected less than 2**63")
    return value


def _positive(text: str) -> int:
    if (value := _natural(text)) == 0:
        raise argparse.ArgumentTypeError("0 is too small; expected 1 or more")
    return value


def _resolution(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no HEIGHTxWIDTH, such as 512x768")
    height, width = int(match[1]), int(match[2])
    step = PIXELS_PER_TOKEN
    if height % step or width % step or not height or not width:
        near = f"{max(round(height / step), 1) * step}x{max(round(width / step), 1) * step}"
        raise argparse.ArgumentTypeError(
            f"{text} does not divide by {step} in both directions; the nearest is {near}"
        )
    return height, width


def _existing(text: str) -> Path:
    path = Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{text} does not exist")
    return path


def _bundle_name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no plain name (letters, digits, '.', '_', '-')")
    return text
