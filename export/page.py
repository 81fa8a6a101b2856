"""The shell of the HTML pages: one style, light and dark, for screens down to a phone's, with nothing to load.

Everything that a page shows is in its file: no script, no font, no address. Text is escaped here, so that a name in a
manifest stays a name.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.table import Table
from rich.text import Text

from runtime.files import write_file
from runtime.terminal import printable

__all__ = ["Bar", "bars", "image_uri", "png", "table", "write_page"]

Bar = tuple[str, float, str]
"""What it is, its length from 0 to 1, and the figure in words."""

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
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
@media (max-width: 30rem) { body { padding: 1rem; } }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
h3 { font-size: .95rem; margin: 1.25rem 0 .5rem; }
p { margin: .25rem 0 .75rem; color: var(--soft); }
.verdict { font-weight: 600; } .pass { color: var(--pass); } .fail { color: var(--fail); font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  white-space: pre-line; }
th { color: var(--soft); font-weight: 600; } td.number, th.number { text-align: right; white-space: nowrap; }
td.lines { white-space: pre; }
.facts td:first-child { width: 1%; white-space: nowrap; } .facts td { overflow-wrap: anywhere; }
tr.parted td { border-bottom: 2px solid var(--soft); }
figure { margin: .75rem 0 1rem; padding: .75rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; }
figcaption { font-weight: 600; margin-bottom: .25rem; }
svg { display: block; width: 100%; min-width: 34rem; height: auto; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.grid { stroke: var(--line); stroke-width: 1; } .curve { fill: none; stroke-width: 1.75; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .82rem; color: var(--soft); }
.legend i { display: inline-block; width: .8rem; height: .2rem; margin-right: .35rem; vertical-align: middle; }
.films { display: grid; gap: .5rem; align-items: start; } .films span { font-size: .82rem; color: var(--soft); }
.films img { display: block; width: 100%; image-rendering: pixelated; border-radius: 3px; }
.bars { display: grid; grid-template-columns: fit-content(45%) 1fr auto; gap: .3rem .75rem; align-items: center;
  font-size: .87rem; font-variant-numeric: tabular-nums; }
.bars i { display: block; height: .7rem; border-radius: 2px; background: var(--s0); min-width: 1px; }
.bars b { display: block; border-radius: 2px; background: var(--line); font-weight: inherit; }
.bars span:nth-child(3n) { color: var(--soft); text-align: right; }
.maps { display: flex; flex-wrap: wrap; gap: .75rem; }
.maps figure { margin: 0; max-width: 100%; box-sizing: border-box; }
.maps img { display: block; max-width: 100%; image-rendering: pixelated; }
.maps figcaption { font-size: .82rem; font-weight: 400; color: var(--soft); margin: 0 0 .4rem; }
footer { margin-top: 2rem; color: var(--soft); font-size: .82rem; }
"""

_STYLES = {"green": "pass", "red": "fail", "bold red": "fail"}
"""What a style of the terminal is called here."""


def write_page(path: Path, title: str, parts: Iterable[str]) -> None:
    """Write a page whose body is the given HTML below its title."""
    body = "\n".join([f"<h1>{escape(title)}</h1>", *parts])
    write_file(
        path,
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n",
    )


def table(shown: Table, heading: str | None = None) -> str:
    """A table of the terminal as HTML, so that what a command prints is laid out once.

    Args:
        shown: its title becomes a heading and its caption a paragraph; markup in cells is kept as far as it says that
            something passed or failed.
        heading: in place of the title; "" for none.
    """
    title = _plain(shown.title) if heading is None else escape(heading)
    kind = "wide" if shown.show_header else "facts"
    parts = [f"<h2>{title}</h2>" if title else "", f'<div class="{kind}"><table>']
    kinds = [
        "number"
        if column.justify == "right"
        else "lines"
        if any("\n" in str(cell) for cell in column.cells)
        else ""
        for column in shown.columns
    ]
    if shown.show_header:
        names = [_plain(column.header) for column in shown.columns]
        parts.append(f"<tr>{_row('th', names, kinds)}</tr>")
    cells = [list(column.cells) for column in shown.columns]
    for row, *values in zip(shown.rows, *cells, strict=True):
        opened = '<tr class="parted">' if row.end_section else "<tr>"
        parts.append(f"{opened}{_row('td', map(_plain, values), kinds)}</tr>")
    parts.append("</table></div>")
    if shown.caption:
        parts.append(f"<p>{_plain(shown.caption)}</p>")
    return "\n".join(filter(None, parts))


def bars(title: str, rows: Sequence[Bar]) -> str:
    """Bars of a common length below one another, each with its figure."""
    lines = "".join(
        f'<span>{escape(name)}</span><b><i style="width:{100 * min(max(length, 0.0), 1.0):.2f}%"></i></b>'
        f"<span>{escape(figure)}</span>"
        for name, length, figure in rows
    )
    return f'<figure><figcaption>{escape(title)}</figcaption><div class="bars">{lines}</div></figure>'


def image_uri(image: NDArray[np.uint8]) -> str:
    """An image `[H, W, 3]` or, with opacity, `[H, W, 4]`, as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png(image)).decode("ascii")


def png(image: NDArray[np.uint8]) -> bytes:
    """An image `[H, W, 3]` or `[H, W, 4]` as a PNG file."""
    file = BytesIO()
    Image.fromarray(image).save(file, "png", optimize=True)
    return file.getvalue()


def _plain(cell: object) -> str:
    """A cell as HTML; what has a style of `_STYLES` in it keeps it."""
    text = cell if isinstance(cell, Text) else Text.from_markup(printable(str(cell or "")), emoji=False)
    style = next((_STYLES[str(span.style)] for span in text.spans if str(span.style) in _STYLES), None)
    inner = escape(text.plain)
    if style:
        return f'<span class="{style}">{inner}</span>'
    return f"<strong>{inner}</strong>" if any(str(span.style) == "bold" for span in text.spans) else inner


def _row(tag: str, cells: Iterable[str], kinds: Iterable[str]) -> str:
    """Cells of HTML in a row; a kind is the class of its column, or empty."""
    return "".join(
        f'<{tag} class="{kind}">{cell}</{tag}>' if kind else f"<{tag}>{cell}</{tag}>"
        for cell, kind in zip(cells, kinds, strict=True)
    )
