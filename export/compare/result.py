"""What a comparison finds: rows with a verdict, curves, and frames; printed as a table and written as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import inf, log10
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic_core
from numpy.typing import NDArray
from rich import box
from rich.markup import escape
from rich.table import Table

__all__ = [
    "Comparison",
    "Difference",
    "Film",
    "Plot",
    "Row",
    "Series",
    "comparison_table",
    "difference",
    "film_rows",
    "frames_row",
    "psnr",
]

Scope = Literal["component", "linear", "step", "rollout"]


@dataclass(frozen=True)
class Row:
    """One comparison: the worst output over all runs.

    Attributes:
        scope: "component"; "linear" (each sees what it sees in the unquantized model); "step" (one forward each, from
            equal states); or "rollout" (forwards that feed on one another's errors).
        relative: L2 norm of the difference over the L2 norm of the reference.
        largest: largest absolute difference; for pixels, in levels of 0..255. None = not looked at.
        psnr: of frames, in dB; None = no frames, or frames that are equal.
    """

    scope: Scope
    name: str
    runs: int
    output: str
    relative: float
    largest: float | None
    tolerance: float
    psnr: float | None = None

    @property
    def passed(self) -> bool:
        """A comparison that came out as not-a-number fails."""
        return self.relative <= self.tolerance


@dataclass(frozen=True)
class Series:
    """A curve: its name and a value for each of the plot's labels; None = there is none."""

    name: str
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Plot:
    """Errors by layer, step or chunk, on a logarithmic axis."""

    title: str
    labels: tuple[str, ...]
    series: tuple[Series, ...]
    axis: str


@dataclass(frozen=True)
class Film:
    """A rollout's frames, uint8 `[N, H, W, 3]`, and whose they are."""

    name: str
    frames: NDArray[np.uint8]


@dataclass
class Comparison:
    """Everything a comparison finds.

    Attributes:
        title: what was compared with what.
        facts: provenance, by name.
        films: the same rollout by each side; the first is the reference.
    """

    title: str
    bundle: str
    facts: dict[str, str]
    tools: Mapping[str, str]
    rows: list[Row] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    films: list[Film] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    def write_json(self, path: Path) -> None:
        """Write rows and curves; errors that are not numbers are null."""
        document: dict[str, Any] = {
            "title": self.title,
            "bundle": self.bundle,
            "passed": self.passed,
            "facts": self.facts,
            "tools": self.tools,
            "rows": [{**asdict(row), "passed": row.passed} for row in self.rows],
            "plots": [asdict(plot) for plot in self.plots],
        }
        path.write_bytes(pydantic_core.to_json(document, indent=1, inf_nan_mode="null") + b"\n")


@dataclass(frozen=True)
class Difference:
    """How an output differs; as Polygraphy asks, true where it is within its tolerance."""

    relative: float
    largest: float
    tolerance: float

    def __bool__(self) -> bool:
        return self.relative <= self.tolerance

    @property
    def excess(self) -> float:
        """How many times its tolerance it is, or the error itself where there is none; NaN counts as infinite."""
        if self.relative != self.relative:
            return inf
        return self.relative if self.tolerance in (0, inf) else self.relative / self.tolerance

    @property
    def rank(self) -> float:
        """Sorts by error. NaN compares false with everything and must not hide: it comes last."""
        return inf if self.relative != self.relative else self.relative


def difference(actual: NDArray[Any], expected: NDArray[Any], tolerance: float = inf) -> Difference:
    """Relative L2 and largest absolute difference, in float64."""
    wide, reference = actual.astype(np.float64), expected.astype(np.float64)
    gap = np.linalg.norm(wide - reference)
    scale = np.linalg.norm(reference)
    relative = float(gap / scale) if scale else float(gap)
    return Difference(relative, float(np.abs(wide - reference).max(initial=0.0)), tolerance)


def psnr(actual: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float | None:
    """Peak signal-to-noise ratio of frames in dB; None where they are equal."""
    error = float(np.mean(np.square(actual.astype(np.float64) - expected.astype(np.float64))))
    return 10 * log10(255.0**2 / error) if error else None


def frames_row(name: str, film: Film, expected: Film, allowed: float) -> Row:
    """Two films of the same rollout."""
    gap = difference(film.frames, expected.frames, allowed)
    signal = psnr(film.frames, expected.frames)
    return Row("rollout", name, 1, "frames", gap.relative, gap.largest, allowed, signal)


def film_rows(pairs: Sequence[tuple[Film, Film]], chunks: int, allowed: float) -> list[Row]:
    """A row for each prompt's films, the right one and the other."""
    names = [f"{chunks} chunks" + (f", prompt {i + 1}" if len(pairs) > 1 else "") for i in range(len(pairs))]
    return [
        frames_row(name, ours, theirs, allowed) for name, (theirs, ours) in zip(names, pairs, strict=True)
    ]


_FIGURES = ("runs", "error", "largest", "PSNR", "limit")


def comparison_table(title: str, rows: Sequence[Row]) -> Table:
    """The rows, each with its verdict."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title=escape(title),
        title_justify="left",
        caption="error: relative L2 norm; largest: absolute difference, of frames in levels of 0 to 255",
        caption_justify="left",
        padding=(0, 1, 0, 0),
    )
    has_frames = any(row.psnr is not None for row in rows)
    signal = ("PSNR",) if has_frames else ()
    for heading in ("scope", "name", "runs", "worst", "error", "largest", *signal, "limit", ""):
        justify: Literal["left", "right"] = "right" if heading in _FIGURES else "left"
        table.add_column(heading, justify=justify, overflow="fold", no_wrap=heading in _FIGURES)
    for row in rows:
        figures = [f"{row.relative:.1e}", "" if row.largest is None else f"{row.largest:.1e}"]
        if has_frames:
            figures.append("" if row.psnr is None else f"{row.psnr:.1f} dB")
        verdict = "[green]pass[/]" if row.passed else "[bold red]FAIL[/]"
        names = map(escape, (row.scope, row.name))
        table.add_row(*names, str(row.runs), escape(row.output), *figures, f"{row.tolerance:.2g}", verdict)
    return table
