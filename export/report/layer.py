"""What `python -m export plan --bundle BUNDLE --layer` prints: the launches of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from export.estimate.layer import LayerLaunch
from export.request.targets import Peak

from .tables import titled_table

__all__ = ["layer_document", "layer_table"]


def layer_document(launches: Sequence[LayerLaunch], peak: Peak) -> dict[str, Any]:
    """The launches as plain data, with their time at the peak rates; predicted, not measured.

    Raises:
        InputError: the peak rate of a product is not known.
    """
    rows = []
    for launch in launches:
        work = launch.work
        rows.append(
            {
                "launch": launch.name,
                "before": launch.before,
                "product": launch.is_product,
                "format": work.format if work is not None and launch.is_product else None,
                "flops": 0 if work is None else work.flops,
                "bytes": None if work is None else work.bytes,
                "seconds": 0.0 if work is None else work.seconds(peak),
            }
        )
    passes = [row for row in rows if not row["product"]]
    return {
        "predicted": True,
        "launches": len(rows),
        "bytes": sum(row["bytes"] or 0 for row in rows),
        "seconds": sum(row["seconds"] for row in rows),
        "element_wise": {
            "launches": len(passes),
            "bytes": sum(row["bytes"] or 0 for row in passes),
            "seconds": sum(row["seconds"] for row in passes),
        },
        "rows": rows,
    }


def layer_table(launches: Sequence[LayerLaunch], peak: Peak, chunk: int) -> Table:
    """One line per launch; see `layer_document`."""
    document = layer_document(launches, peak)
    table = titled_table(
        f"One layer of a forward of chunk {chunk}, as built (times predicted)",
        *("before", "launch", "in", "MB", "us", "of it"),
    )
    total = document["seconds"]
    for row in document["rows"]:
        moved = row["bytes"]
        table.add_row(
            row["before"],
            escape(row["launch"]),
            row["format"] or "",
            "" if moved is None else f"{moved / 1e6:.1f}",
            "" if moved is None else f"{row['seconds'] * 1e6:.1f}",
            "" if moved is None else f"{row['seconds'] / total:.1%}",
        )
    passes = document["element_wise"]
    table.caption = (
        f"{document['launches']} launches, {document['bytes'] / 1e6:.0f} MB, {total * 1e6:.0f} us at the peak rates; "
        f"of them {passes['launches']} that only move, {passes['bytes'] / 1e6:.0f} MB, "
        f"{passes['seconds'] / total:.0%} of the time. What the choice of blocks moves is not counted"
    )
    table.caption_justify = "left"
    return table
