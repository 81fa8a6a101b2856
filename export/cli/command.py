"""What a sub-command of `python -m export` is, and the arguments that several of them take.

Argument types validate at the door: a bad value ends in one line that says what is expected.
"""

from __future__ import annotations

import argparse
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, NoReturn

from export.errors import InputError

from .sources import add_transformer_files

__all__ = [
    "DEFAULT_OUT",
    "Command",
    "CommandParser",
    "add_model_arguments",
    "add_source_arguments",
    "bundle_name",
    "existing",
    "output",
    "policies",
    "positive",
    "tolerance",
]

DEFAULT_OUT = Path("engines/built")
PIXELS_PER_TOKEN = 16
"""A video's height and width are multiples of this: 8 pixels per latent pixel, 2 latent pixels per token."""

_SECTIONS = ("generator_ema", "generator", "model")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class CommandParser(argparse.ArgumentParser):
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


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """What model, for what target, in which variant."""
    parser.add_argument(
        "--gpu",
        default="cpu",
        metavar="TARGET",
        help="target name or TOML file, or auto for the GPU of this machine (default: cpu)",
    )
    parser.add_argument(
        "--preset", help="model size: tiny, wan-1.3b or wan-14b (default: tiny, or the model's)"
    )
    parser.add_argument(
        "--decoder",
        metavar="NAME",
        help="of random weights, and of plans: wan, light, tiny, tae, light-tae or tiny-tae (default: the preset's)",
    )
    parser.add_argument("--init", choices=["random"], help="random weights instead of a checkpoint's")
    parser.add_argument("--seed", type=seed, help="of the random weights (default: 0)")
    add_transformer_files(parser)
    parser.add_argument(
        "--section",
        choices=_SECTIONS,
        help="group of a training checkpoint to take (the first of these that it has)",
    )
    parser.add_argument(
        "--resolution", type=resolution, metavar="HxW", help="of the video in pixels (default: the preset's)"
    )
    parser.add_argument(
        "--any-pairing",
        action="store_true",
        help="take files and variants that were not made for each other",
    )
    sparse = parser.add_argument_group("attention")
    sparse.add_argument("--variant", metavar="NAME", help="name or TOML file (default: the target's)")
    sparse.add_argument(
        "--policy",
        metavar="NAME",
        help="how attention selects, with the method's defaults: hsa, dense, sta, radial, sparge, sla or vmoba",
    )
    sparse.add_argument(
        "--sparsity", type=fraction, metavar="S", help="average fraction of key blocks to skip"
    )
    sparse.add_argument(
        "--sparsity-base",
        type=fraction,
        metavar="S",
        help="the fraction in the limit of a long history (default: --sparsity plus the variant's own distance)",
    )
    sparse.add_argument("--keep-frames", type=positive, metavar="N", help="past frames the first stage keeps")
    sparse.add_argument("--sink", type=natural, metavar="N", help="first frames that are always kept")
    sparse.add_argument("--near", type=natural, metavar="N", help="latest frames that are always kept")
    sparse.add_argument("--window", type=positive, metavar="N", help="latent frames attention may see")
    parser.add_argument(
        "--kv",
        choices=("bf16", "fp8"),
        help="what keys and values are held in: the type that the model computes in, or E4M3 with a scale for every "
        "block, half the cache (default: the variant's)",
    )
    parser.add_argument(
        "--recache",
        choices=("window", "all", "none", "joint", "flush", "cut"),
        help="what a prompt switch does to cached frames where it does not say (default: the variant's)",
    )
    parser.add_argument(
        "--attention",
        choices=("bf16", "fp8"),
        help="what attention multiplies: 16 bits, or E4M3 from compute capability 8.9 on, which implies --kv fp8 "
        "(default: the variant's)",
    )
    sparse.add_argument(
        "--frames",
        type=positive,
        metavar="N",
        help="planned length of a clip in frames of video, which the sparsity table follows (default: the variant's)",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The sources, and where what is built goes."""
    add_source_arguments(parser)
    parser.add_argument("--per-chunk", action="store_true", help="also write a specialised graph per chunk")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"folder (default: {DEFAULT_OUT})")


def fraction(text: str) -> float:
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is outside [0, 1)")
    return value


def tolerance(text: str) -> float:
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def natural(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 up")
    return int(text)


def policies(text: str) -> list[str]:
    from runtime.bundle.policies import POLICIES

    names = list(POLICIES) if text == "all" else text.split(",")
    for name in names:
        if name not in POLICIES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(POLICIES)}, all")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text} names a policy twice")
    return names


def seed(text: str) -> int:
    if (value := natural(text)) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text} is too large; expected less than 2**63")
    return value


def positive(text: str) -> int:
    if (value := natural(text)) == 0:
        raise argparse.ArgumentTypeError("0 is too small; expected 1 or more")
    return value


def resolution(text: str) -> tuple[int, int]:
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


def existing(text: str) -> Path:
    path = Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{text} does not exist")
    return path


def output(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"{text} cannot be written: {'it is a folder' if path.is_dir() else f'{path.parent} is no folder'}"
        )
    return path


def bundle_name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no plain name (letters, digits, '.', '_', '-')")
    return text
