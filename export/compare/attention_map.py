"""The picture of sparse attention: which key blocks each query block looks at, by chunk, layer and head.

Drawn from the reference's rollout, so that it needs no GPU, whatever the bundle is for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from export.errors import ComparisonError
from export.page import image_uri, write_page
from runtime.bundle import load_bundle

from .against_policies import with_policy
from .against_reference import reference_embedding
from .reference import Reference, require_one_by_one
from .selection import Recording
from .trials import SEED

__all__ = ["AttentionMaps", "attention_maps", "write_maps"]

_INK, _FRAME, _CHUNK = (47, 126, 219), (128, 136, 150, 96), (128, 136, 150, 255)
"""What is seen, lines between frames, and the line before the chunk's own: they show on white and on near-black."""

_PAPER, _TEXT = (246, 247, 249), (93, 103, 120)
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
    require_one_by_one(manifest)
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
        write_page(path, maps.title, _parts(maps))
    else:
        _sheet(maps).save(path)


def _panel(seen: NDArray[np.float32], maps: AttentionMaps) -> NDArray[np.uint8]:
    """One head `[H, W, 4]`: queries down, keys across, as opaque as what is seen, with lines between frames."""
    rows, columns = seen.shape
    size = max(1, min(8, 480 // max(rows, columns)))
    pixels = np.empty((rows, columns, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = _INK, (seen * 255).round()
    pixels = np.repeat(np.repeat(pixels, size, 0), size, 1)
    pixels[maps.q_blocks * size :: maps.q_blocks * size] = _FRAME
    pixels[:, maps.k_blocks * size :: maps.k_blocks * size] = _FRAME
    current = columns - rows // maps.q_blocks * maps.k_blocks
    if current:
        pixels[:, current * size] = _CHUNK
    return pixels


def _label(chunk: int, layer: int, seen: NDArray[np.float32]) -> str:
    return f"chunk {chunk}, layer {layer}: {seen.mean():.1%} seen"


def _sheet(maps: AttentionMaps) -> Image.Image:
    """Every chunk and layer in a row of heads."""
    rows = [
        (_label(chunk, layer, seen), [Image.fromarray(_panel(head, maps)) for head in seen])
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
        draw.text((_GAP, top), label, fill=_TEXT)
        top, left = top + _LABEL, _GAP
        for panel in panels:
            sheet.paste(_PAPER, (left, top, left + panel.width, top + panel.height))
            sheet.paste(panel, (left, top), mask=panel)
            left += panel.width + _GAP
        top += panels[0].height + _GAP
    return sheet


def _parts(maps: AttentionMaps) -> Iterator[str]:
    yield (
        "<p>Which key blocks (across, oldest frame first) each query block (down) looks at; lines lie between frames, "
        "the strong one before the frames of the chunk itself. A paler block is seen in part.</p>"
    )
    for chunk, layers in maps.chunks.items():
        yield f"<h2>Chunk {chunk}</h2>"
        for layer, seen in layers.items():
            label = _label(chunk, layer, seen)
            yield f'<h3>{label}</h3><div class="maps">'
            for number, head in enumerate(seen):
                caption = f"head {number}: {head.mean():.1%}"
                image = f'<img alt="{label}, {caption}" src="{image_uri(_panel(head, maps))}">'
                yield f"<figure><figcaption>{caption}</figcaption>{image}</figure>"
            yield "</div>"
