"""The picture of sparse attention: which key blocks each query block looks at, by chunk, layer and head.

Drawn from the reference's rollout, so that it needs no GPU, whatever the bundle is for.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from export.errors import ComparisonError
from runtime.bundle import load_bundle

from .against_policies import with_policy
from .against_reference import reference_embedding
from .reference import Reference
from .selection import Recording
from .trials import SEED

__all__ = ["AttentionMaps", "attention_maps", "write_maps"]

_PAPER, _INK, _FRAME, _CHUNK = (246, 247, 249), (31, 102, 193), (203, 209, 219), (93, 103, 120)
_GAP, _LABEL = 10, 14


@dataclass(frozen=True)
class AttentionMaps:
    """What a rollout looked at.

    Attributes:
        title: what was rolled out, in words.
        q_blocks, k_blocks: blocks of a frame.
        chunks: chunk -> layer -> `[H, query blocks, resident key blocks]`, the share of a pair of blocks that is seen.
    """

    title: str
    q_blocks: int
    k_blocks: int
    chunks: Mapping[int, Mapping[int, NDArray[np.float32]]]


def attention_maps(
    path: Path,
    *,
    chunks: int = 3,
    step: int = 0,
    layers: Sequence[int] | None = None,
    policy: str | None = None,
    reference: Reference | None = None,
) -> AttentionMaps:
    """Roll out the model of the bundle at `path` and note what one denoising forward of every chunk looks at.

    Args:
        chunks: length of the rollout.
        step: which of the denoising forwards.
        layers: None = all.
        policy: another method in place of the bundle's, at its defaults.
        reference: the model with the bundle's weights; None = rebuilt from what the manifest names.

    Raises:
        BundleError: the bundle cannot be used.
        ComparisonError: the reference's weights are needed and were not given, or there is no such step or layer.
        InputError: there is no such method.
    """
    bundle = load_bundle(path)
    reference = reference or Reference.of(bundle.manifest)
    manifest = bundle.manifest
    if policy is not None:
        _, manifest = with_policy(manifest, reference, policy)
    model, schedule = manifest.model, manifest.schedule
    steps = min(len(schedule.rows(0)), len(schedule.rows(1)))
    if step >= steps:
        raise ComparisonError(f"there is no step {step}; a chunk has the denoising forwards 0 to {steps - 1}")
    wanted = range(model.layers) if layers is None else layers
    for layer in wanted:
        if layer >= model.layers:
            raise ComparisonError(f"there is no layer {layer}; {model.preset} has 0 to {model.layers - 1}")
    recording = Recording()
    embedding = reference_embedding(bundle, reference)
    rollout = reference.rollout(manifest, embedding, SEED, kernels=recording.kernels())
    for _ in rollout.stream(chunks):
        pass
    maps = {
        chunk: dict(enumerate(recording.forward(chunk, step, model.layers))) for chunk in recording.chunks
    }
    attention = manifest.attention
    return AttentionMaps(
        f"{manifest.name}, {attention.method.policy}, step {step}",
        -(-model.frame_tokens // attention.block_q),
        -(-model.frame_tokens // attention.block_k),
        {chunk: {layer: seen[layer] for layer in wanted} for chunk, seen in maps.items()},
    )


def write_maps(maps: AttentionMaps, path: Path) -> None:
    """Write the picture: a page where `path` ends in .html, else an image."""
    if path.suffix.lower() == ".html":
        path.write_text(_page(maps), encoding="utf-8")
    else:
        _sheet(maps).save(path)


def _panel(seen: NDArray[np.float32], maps: AttentionMaps) -> Image.Image:
    """One head: queries down, keys across, lines between frames, a dark one before the current chunk."""
    rows, columns = seen.shape
    size = max(1, min(8, 480 // max(rows, columns)))
    colours = np.array(_PAPER) + seen[..., None] * (np.array(_INK) - np.array(_PAPER))
    pixels = np.repeat(np.repeat(colours.round().astype(np.uint8), size, 0), size, 1)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    draw = ImageDraw.Draw(image)
    for row in range(maps.q_blocks, rows, maps.q_blocks):
        draw.line([(0, row * size), (image.width, row * size)], fill=_FRAME)
    current = columns - rows // maps.q_blocks * maps.k_blocks
    for column in range(maps.k_blocks, columns, maps.k_blocks):
        fill = _CHUNK if column == current else _FRAME
        draw.line([(column * size, 0), (column * size, image.height)], fill=fill)
    return image


def _label(chunk: int, layer: int, seen: NDArray[np.float32]) -> str:
    return f"chunk {chunk}, layer {layer}: {seen.mean():.1%} seen"


def _sheet(maps: AttentionMaps) -> Image.Image:
    """Every chunk and layer in a row of heads."""
    rows = [
        (_label(chunk, layer, seen), [_panel(head, maps) for head in seen])
        for chunk, layers in maps.chunks.items()
        for layer, seen in layers.items()
    ]
    width = max(sum(panel.width + _GAP for panel in panels) for _, panels in rows) + _GAP
    height = sum(panels[0].height + _LABEL + _GAP for _, panels in rows) + _LABEL + 2 * _GAP
    sheet = Image.new("RGB", (max(width, 320), height), "white")
    draw, top = ImageDraw.Draw(sheet), _GAP
    draw.text((_GAP, top), maps.title, fill="black")
    top += _LABEL + _GAP
    for label, panels in rows:
        draw.text((_GAP, top), label, fill=_CHUNK)
        top, left = top + _LABEL, _GAP
        for panel in panels:
            sheet.paste(panel, (left, top))
            left += panel.width + _GAP
        top += panels[0].height + _GAP
    return sheet


def _page(maps: AttentionMaps) -> str:
    parts = []
    for chunk, layers in maps.chunks.items():
        parts.append(f"<h2>Chunk {chunk}</h2>")
        for layer, seen in layers.items():
            images = "".join(
                f'<figure><img alt="" src="{_uri(_panel(head, maps))}"><figcaption>head {number}: {head.mean():.1%}'
                "</figcaption></figure>"
                for number, head in enumerate(seen)
            )
            parts.append(f"<h3>{_label(chunk, layer, seen)}</h3><div>{images}</div>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escape(maps.title)}</title>\n<style>body {{ font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem; "
        "color: #1c2330; } h3 { font-size: .9rem; margin: .75rem 0 .25rem; } div { display: flex; flex-wrap: wrap; "
        "gap: .75rem; } figure { margin: 0; } figcaption { font-size: .8rem; color: #5d6778; } "
        "img { image-rendering: pixelated; border: 1px solid #d5dae2; }</style>\n</head>\n<body>\n"
        f"<h1>{escape(maps.title)}</h1>\n<p>Which key blocks (across, oldest frame first) each query block (down) "
        "looks at; lines lie between frames, the dark one before the frames of the chunk itself. A paler block is seen "
        f"in part.</p>\n{''.join(parts)}\n</body>\n</html>\n"
    )


def _uri(image: Image.Image) -> str:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
