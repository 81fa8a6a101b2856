"""The command `attention-map`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command import Command, natural, output, positive
from .compare import reference_of
from .sources import add_decoder_and_text_files, add_transformer_files

__all__ = ["AttentionMap"]


class AttentionMap(Command):
    """Draw which key blocks each layer, head and query block of a bundle's model looks at, chunk by chunk.

    Taken from the reference's rollout of a fixed prompt and seed, on any machine, whatever the bundle's target.
    """

    name = "attention-map"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("bundle", type=Path, help="folder of the bundle")
        parser.add_argument(
            "--out",
            type=picture,
            default=Path("attention.html"),
            metavar="FILE",
            help="a page (.html) or an image (.png) (default: attention.html)",
        )
        parser.add_argument("--chunks", type=positive, default=3, help="length of the rollout (default: 3)")
        parser.add_argument("--step", type=natural, default=0, help="which denoising forward (default: 0)")
        parser.add_argument("--layers", type=numbers, metavar="LIST", help="e.g. 0,5 (default: all)")
        parser.add_argument(
            "--policy", metavar="NAME", help="another method of selection in place of the bundle's"
        )
        files = parser.add_argument_group(
            "the files the bundle was built from, unless its weights are random"
        )
        add_transformer_files(files)
        add_decoder_and_text_files(files)

    def run(self, args: argparse.Namespace) -> int:
        reference = reference_of(args)

        from export.compare.attention_map import attention_maps, write_maps

        maps = attention_maps(
            args.bundle,
            chunks=args.chunks,
            step=args.step,
            layers=args.layers,
            policy=args.policy,
            reference=reference,
        )
        write_maps(maps, args.out)
        return 0


def picture(text: str) -> Path:
    if not text.lower().endswith((".html", ".png")):
        raise argparse.ArgumentTypeError(f"{text} is neither a page (.html) nor an image (.png)")
    return output(text)


def numbers(text: str) -> list[int]:
    return [natural(part) for part in text.split(",")]
