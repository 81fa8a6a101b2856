"""A comparison as one HTML page that needs nothing else: tables, curves as inline SVG, frames as data URIs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from math import ceil, floor, log10
from pathlib import Path

import numpy as np
from rich.markup import escape as unmarked
from rich.table import Table

from export.page import image_uri, table, write_page

from .result import Comparison, Film, Plot, comparison_table

__all__ = ["write_report"]

_MOST_FRAMES = 4
"""Frames shown of each film."""

_GAIN = 8
"""What differences of frames are multiplied by to be seen."""


def write_report(comparison: Comparison, path: Path) -> None:
    """Write the page. Everything that comes from a bundle is escaped."""
    failed = [row for row in comparison.rows if not row.passed]
    verdict = (
        f'<span class="verdict fail">{len(failed)} of {len(comparison.rows)} rows are past their tolerance</span>'
        if failed
        else f'<span class="verdict pass">All {len(comparison.rows)} rows are within their tolerance</span>'
    )
    parts = [
        f"<p>{verdict}</p>",
        table(comparison_table(comparison.title, comparison.rows), "Results"),
        *_plots(comparison.plots),
        *_films(comparison.films),
        _facts("Provenance", comparison.facts),
        _facts("Tools", comparison.tools),
        "<footer>Errors are relative L2 norms: of the difference, over that of the reference. Curves have logarithmic "
        "axes; a point that is missing is zero or not a number.</footer>",
    ]
    write_page(path, comparison.title, parts)


def _facts(title: str, facts: Mapping[str, str]) -> str:
    shown = Table("", "", title=title, show_header=False)
    for name, value in facts.items():
        shown.add_row(unmarked(name), unmarked(value))
    return table(shown)


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
    yield f'<div class="wide"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(plot.title)}">'
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
    yield '</svg></div>\n<div class="legend">'
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
                yield f'<img alt="{escape(f"{name}, frame {index}")}" src="{image_uri(frames[index])}">'
        yield "</div></figure>"
