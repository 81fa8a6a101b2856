"""A comparison as one HTML page that needs nothing else: tables, curves as inline SVG, frames as data URIs."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from html import escape
from io import BytesIO
from math import ceil, floor, log10
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .result import Comparison, Film, Plot, Row

__all__ = ["png", "render", "write_report"]

_MOST_FRAMES = 4
"""Frames shown of each film."""

_GAIN = 8
"""What differences of frames are multiplied by to be seen."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5d6778; --line: #d5dae2; --paper: #fff; --card: #f6f7f9;
  --pass: #1a7f37; --fail: #c6281c;
  --s0: #1f66c1; --s1: #c4541a; --s2: #1d8a56; --s3: #9334b8; --s4: #a07a00; --s5: #0b8a99; --s6: #c02669;
  --s7: #5f6b7c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa5b5; --line: #343c49; --paper: #14181f;
  --card: #1c222b; --pass: #4cc26b; --fail: #ff7b6b;
  --s0: #6aa9ff; --s1: #ff9a5c; --s2: #5ed39b; --s3: #d28bf0; --s4: #e0bd4a; --s5: #57cfdd; --s6: #ff7fb0;
  --s7: #aab4c3; } }
body { margin: 0 auto; max-width: 64rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .25rem 0 .75rem; color: var(--soft); }
.verdict { font-weight: 600; } .pass { color: var(--pass); } .fail { color: var(--fail); font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; } td.number, th.number { text-align: right; }
td.word { overflow-wrap: anywhere; }
figure { margin: 0 0 1rem; padding: .75rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; }
figcaption { font-weight: 600; margin-bottom: .25rem; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.grid { stroke: var(--line); stroke-width: 1; } .curve { fill: none; stroke-width: 1.75; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .82rem; color: var(--soft); }
.legend i { display: inline-block; width: .8rem; height: .2rem; margin-right: .35rem; vertical-align: middle; }
.films { display: grid; gap: .5rem; align-items: start; } .films span { font-size: .82rem; color: var(--soft); }
.films img { display: block; width: 100%; image-rendering: pixelated; border-radius: 3px; }
footer { margin-top: 2rem; color: var(--soft); font-size: .82rem; }
"""


def write_report(comparison: Comparison, path: Path) -> None:
    """Write the page."""
    path.write_text(render(comparison), encoding="utf-8")


def render(comparison: Comparison) -> str:
    """The page, as text. Everything that comes from a bundle is escaped."""
    failed = [row for row in comparison.rows if not row.passed]
    verdict = (
        f'<span class="verdict fail">{len(failed)} of {len(comparison.rows)} rows are past their tolerance</span>'
        if failed
        else f'<span class="verdict pass">All {len(comparison.rows)} rows are within their tolerance</span>'
    )
    parts = [
        f"<h1>{escape(comparison.title)}</h1>",
        f"<p>{verdict}</p>",
        *_summary(comparison.rows),
        *_plots(comparison.plots),
        *_films(comparison.films),
        *_facts("Provenance", comparison.facts),
        *_facts("Tools", dict(comparison.tools)),
        "<footer>Errors are relative L2 norms: of the difference, over that of the reference. Curves have logarithmic "
        "axes; a point that is missing is zero or not a number.</footer>",
    ]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(comparison.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


# ---- tables ----


def _summary(rows: Sequence[Row]) -> Iterator[str]:
    yield '<h2>Results</h2>\n<div class="wide"><table>'
    figures = ("relative L2", "largest", "PSNR", "tolerance")
    headings = [("scope", ""), ("name", ""), ("runs", "number"), ("worst output", "")]
    headings += [*((figure, "number") for figure in figures), ("", "")]
    yield "<tr>" + "".join(f'<th class="{kind}">{name}</th>' for name, kind in headings) + "</tr>"
    for row in rows:
        largest = "" if row.largest is None else f"{row.largest:.1e}"
        signal = "" if row.psnr is None else f"{row.psnr:.1f} dB"
        names = "".join(f'<td class="word">{escape(text)}</td>' for text in (row.scope, row.name))
        cells = (f"{row.relative:.1e}", largest, signal, f"{row.tolerance:.2g}")
        verdict = '<td class="pass">pass</td>' if row.passed else '<td class="fail">FAIL</td>'
        yield (
            f'<tr>{names}<td class="number">{row.runs}</td><td class="word">{escape(row.output)}</td>'
            + "".join(f'<td class="number">{figure}</td>' for figure in cells)
            + f"{verdict}</tr>"
        )
    yield "</table></div>"


def _facts(title: str, facts: dict[str, str]) -> Iterator[str]:
    yield f'<h2>{escape(title)}</h2>\n<div class="wide"><table>'
    for name, value in facts.items():
        yield f'<tr><td>{escape(name)}</td><td class="word">{escape(value)}</td></tr>'
    yield "</table></div>"


# ---- curves ----

_WIDTH, _HEIGHT = 720, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 34


def _plots(plots: Sequence[Plot]) -> Iterator[str]:
    if plots:
        yield "<h2>Curves</h2>"
    for plot in plots:
        yield from _plot(plot)


def _plot(plot: Plot) -> Iterator[str]:
    values = [value for series in plot.series for value in series.values if value]
    if not values:
        return
    low, high = floor(log10(min(values))), ceil(log10(max(values)))
    high = max(high, low + 1)
    count = len(plot.labels)

    def x(index: int) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * ((index + 0.5) / count)

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - log10(value)) / (high - low)

    yield f"<figure><figcaption>{escape(plot.title)}</figcaption>"
    yield f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(plot.title)}">'
    for power in range(low, high + 1):
        level = y(10.0**power)
        yield f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{level:.1f}" y2="{level:.1f}"/>'
        yield f'<text x="{_LEFT - 6}" y="{level + 4:.1f}" text-anchor="end">1e{power}</text>'
    every = ceil(count / 24)
    for index, label in enumerate(plot.labels):
        if index % every == 0:
            place = f'x="{x(index):.1f}" y="{_HEIGHT - _BOTTOM + 15}"'
            yield f'<text {place} text-anchor="middle">{escape(label)}</text>'
    yield f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 3}" text-anchor="middle">{escape(plot.axis)}</text>'
    for number, series in enumerate(plot.series):
        colour = f"var(--s{number % 8})"
        points = [(x(i), y(value), plot.labels[i], value) for i, value in enumerate(series.values) if value]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py, _, _ in points)
        yield f'<polyline class="curve" style="stroke:{colour}" points="{line}"/>'
        for px, py, label, value in points:
            hint = f"{series.name}, {plot.axis} {label}: {value:.2e}"
            yield (
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.5" style="fill:{colour}"><title>{escape(hint)}</title>'
                "</circle>"
            )
    yield '</svg>\n<div class="legend">'
    for number, series in enumerate(plot.series):
        yield f'<span><i style="background:var(--s{number % 8})"></i>{escape(series.name)}</span>'
    yield "</div></figure>"


# ---- frames ----


def _films(films: Sequence[Film]) -> Iterator[str]:
    if len(films) < 2:
        return
    reference, *others = films
    count = min(len(film.frames) for film in films)
    picked = sorted({round(index * (count - 1) / (_MOST_FRAMES - 1)) for index in range(_MOST_FRAMES)})
    yield f"<h2>Frames</h2>\n<p>The same prompt and noise; differences are {_GAIN} times what they are.</p>"
    for other in others:
        yield f'<figure><div class="films" style="grid-template-columns:auto repeat({len(picked)},1fr)">'
        gap = np.abs(other.frames[:count].astype(np.int16) - reference.frames[:count].astype(np.int16))
        amplified = np.minimum(gap * _GAIN, 255).astype(np.uint8)
        yield "<span></span>" + "".join(f"<span>frame {index}</span>" for index in picked)
        for name, frames in (
            (reference.name, reference.frames),
            (other.name, other.frames),
            ("difference", amplified),
        ):
            yield f"<span>{escape(name)}</span>"
            for index in picked:
                yield f'<img alt="{escape(f"{name}, frame {index}")}" src="{_data_uri(frames[index])}">'
        yield "</div></figure>"


def _data_uri(frame: NDArray[np.uint8]) -> str:
    return "data:image/png;base64," + base64.b64encode(png(frame)).decode("ascii")


def png(image: NDArray[np.uint8]) -> bytes:
    """An RGB image `[H, W, 3]` as a PNG file."""
    file = BytesIO()
    Image.fromarray(image).save(file, "png", optimize=True)
    return file.getvalue()
