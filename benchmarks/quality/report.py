"""Writes the quality benchmark's results: table, JSON, plots, contact sheet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .scores import ClipScore, chunk_frames, summarise

__all__ = ["COLUMNS", "Line", "write_report"]

COLUMNS: dict[str, str] = {
    "seen": "%",
    "ground": "%",
    "colour": "%",
    "shape": "%",
    "motion": "%",
    "kind": "%",
    "held_out_all": "%",
    "path_error": "px",
    "steady": "%",
    "drift": "%",
    "reappears": "%",
    "psnr": "dB",
    "ssim": "",
}
"""Figures of the table and their units."""

Frames = npt.NDArray[np.uint8]


@dataclass
class Line:
    """What one row reached.

    Attributes:
        share: the part of the keys of all frames so far that its queries saw after the first chunk; None = not known.
        scores: one for each clip.
        sheet: the frames of the first few clips.
    """

    name: str
    share: float | None = None
    scores: list[ClipScore] = field(default_factory=list)
    sheet: list[Frames] = field(default_factory=list)


def _cell(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "%":
        return f"{100 * value:.0f}"
    return f"{value:.3f}" if unit == "" else f"{value:.1f}"


def table(summaries: Mapping[str, Mapping[str, float | None]]) -> str:
    """Markdown."""
    head = ["row", *(f"{name} {unit}".strip() for name, unit in COLUMNS.items())]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row, summary in summaries.items():
        cells = [_cell(summary[name], unit) for name, unit in COLUMNS.items()]
        lines.append("| " + " | ".join([row, *cells]) + " |")
    return "\n".join(lines) + "\n"


def write_report(folder: Path, lines: Sequence[Line], settings: Mapping[str, object]) -> str:
    """Write quality.json, quality.md, quality.png and contact_sheet.png to `folder`; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = {line.name: line.scores for line in lines}
    sheets = {line.name: line.sheet for line in lines}
    summaries = {line.name: {"seen": line.share, **summarise(line.scores)} for line in lines}
    content = {
        "schema_version": 1,
        "settings": dict(settings),
        "rows": {
            row: {"summary": summaries[row], "clips": [asdict(clip) for clip in clips]}
            for row, clips in scores.items()
        },
    }
    (folder / "quality.json").write_text(json.dumps(content, indent=1) + "\n")
    text = table(summaries)
    (folder / "quality.md").write_text(text)
    _plot(folder / "quality.png", scores, summaries)
    _contact_sheet(folder / "contact_sheet.png", sheets)
    return text


def _plot(
    path: Path,
    scores: Mapping[str, Sequence[ClipScore]],
    summaries: Mapping[str, Mapping[str, float | None]],
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(15, 5), layout="constrained")
    names = ("colour", "shape", "motion")
    places = np.arange(len(summaries))
    for offset, name in enumerate(names):
        heights = [100 * (summary[name] or 0.0) for summary in summaries.values()]
        left.bar(places + 0.27 * (offset - 1), heights, 0.25, label=name)
    left.set_xticks(places, list(summaries), rotation=30, ha="right")
    left.set_ylabel("% of clips")
    left.set_ylim(0, 100)
    left.legend(loc="lower left")
    for row, clips in scores.items():
        chunks = min(len(clip.by_chunk) for clip in clips)
        values = [100 * np.mean([clip.by_chunk[chunk] for clip in clips]) for chunk in range(chunks)]
        right.plot(range(1, chunks + 1), values, marker="o", label=row)
    right.set_xlabel("chunk")
    right.set_ylabel("% with the caption's colour and shape")
    right.set_ylim(0, 102)
    right.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _contact_sheet(path: Path, sheets: Mapping[str, Sequence[Frames]]) -> None:
    """One line per clip: a frame of each chunk; rows of the benchmark below each other, clip by clip. Half size."""
    from PIL import Image, ImageDraw

    names = list(sheets)
    lines: list[tuple[str, Frames]] = []
    for index in range(min(len(clips) for clips in sheets.values())):
        for name in names:
            frames = sheets[name][index]
            chunks = (len(frames) + 3) // 12
            picked = [frames[chunk_frames(chunk)][4] for chunk in range(chunks)]
            lines.append((name, np.concatenate(picked, axis=1)))
    label = 210
    width = label + max(line.shape[1] for _, line in lines)
    height = lines[0][1].shape[0]
    sheet = Image.new("RGB", (width, height * len(lines)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, line) in enumerate(lines):
        sheet.paste(Image.fromarray(line), (label, row * height))
        draw.text((4, row * height + height // 2 - 10), name, fill="black", font_size=18)
    half = sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.LANCZOS)
    half.quantize(256).save(path, optimize=True)
