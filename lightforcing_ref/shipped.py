"""Weights that come with the package, by preset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ASSETS", "CAPTIONS", "WORDS", "Shipped", "shipped"]

ASSETS = Path(__file__).parent / "assets"

CAPTIONS: Mapping[str, str] = {"tiny": "a yellow square on black moves right from the top left"}
"""By preset, a prompt of the form that its weights were trained on; they know no others."""

WORDS: Mapping[str, tuple[str, ...]] = {
    "tiny": (
        *(
            "a",
            "and",
            "anticlockwise",
            "at",
            "black",
            "blue",
            "bottom",
            "bounces",
            "brown",
            "centre",
            "circle",
        ),
        *(
            "clockwise",
            "cross",
            "cyan",
            "down",
            "from",
            "green",
            "grey",
            "grows",
            "leaves",
            "left",
            "moves",
            "on",
        ),
        *(
            "orbits",
            "pink",
            "red",
            "returns",
            "right",
            "square",
            "the",
            "top",
            "triangle",
            "up",
            "white",
            "yellow",
        ),
    )
}
"""By preset, the words of the captions that its weights were trained on, where these are few."""


@dataclass(frozen=True)
class Shipped:
    """Files of one preset, all of them present.

    `transformer` is finetuned under sparse attention; `dense_transformer` is the same model before that, and the
    better one where every chunk attends densely; `framewise_transformer` is that one, trained on for chunks of one
    latent frame.
    """

    transformer: Path
    dense_transformer: Path
    framewise_transformer: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path


def shipped(preset: str) -> Shipped | None:
    """The files that come with the package for a preset; None if there are none, or not all of them."""
    folder = ASSETS / preset
    files = Shipped(
        transformer=folder / "dit.safetensors",
        dense_transformer=folder / "dit_dense.safetensors",
        framewise_transformer=folder / "dit_framewise.safetensors",
        vae=folder / "vae.safetensors",
        text_encoder=folder / "text_encoder.safetensors",
        tokenizer=folder / "tokenizer.json",
    )
    complete = all(path.is_file() for path in vars(files).values())
    return files if complete else None
