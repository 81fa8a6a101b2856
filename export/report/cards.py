"""What `python -m export plan --all` prints: every GPU in one table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table

from export.estimate.efficiency import Efficiency
from export.estimate.memory import plan_memory
from export.estimate.roofline import predict
from export.request.plan import PlanRequest
from export.request.targets import Target
from export.units import readable_size

from .tables import titled_table

__all__ = ["Card", "cards_document", "cards_table"]

Card = tuple[Target, PlanRequest | None]
"""A target, and the plan on it; None where it does not compute in the precision that is asked for."""


def cards_table(cards: Iterable[Card], sessions: int, efficiency: Efficiency) -> Table:
    """One line per target: whether it fits, and how fast it can be."""
    table = titled_table(
        "Every GPU (speeds predicted, not measured)",
        *("gpu", "GiB", "variant", "in", "peak", "sessions", "FPS, floor", f"FPS {efficiency.short}"),
    )
    for row in cards_document(cards, sessions, efficiency):
        if row["precision"] is None:
            table.add_row(row["gpu"], f"{row['memory_gib']:g}", "-", "-", "-", "-", "-", "-")
            continue
        fits = f"[green]{row['most_sessions']}[/]" if row["fits"] else "[bold red]does not fit[/]"
        speeds = [f"{row[key]:.1f}" if row[key] else "-" for key in ("fps_floor", "fps")]
        table.add_row(
            row["gpu"],
            f"{row['memory_gib']:g}",
            row["variant"],
            row["precision"],
            readable_size(row["peak_bytes"]),
            fits,
            *(speeds if row["fits"] else ("-", "-")),
        )
    table.caption = "sessions: how many fit; floor: at 100 % of the published rates; real times are longer"
    return table


def cards_document(cards: Iterable[Card], sessions: int, efficiency: Efficiency) -> list[dict[str, Any]]:
    """The same as plain data."""
    rows: list[dict[str, Any]] = []
    for target, request in cards:
        row: dict[str, Any] = {"gpu": target.name, "title": target.title, "memory_gib": target.memory_gib}
        if request is None:
            rows.append(row | {"precision": None})
            continue
        memory, clip = plan_memory(request, sessions), predict(request)
        row |= {
            "variant": request.variant.name,
            "precision": request.precision,
            "peak_bytes": memory.peak,
            "fits": memory.fits,
            "most_sessions": memory.most_sessions,
            "fps_floor": None if clip is None else clip.fps,
            "fps": None if clip is None else efficiency.fps(clip),
        }
        rows.append(row)
    return rows
