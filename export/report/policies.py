"""What `python -m export plan --policies` prints: methods of selection side by side, on one GPU or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.markup import escape
from rich.table import Table

from export.estimate.efficiency import Efficiency
from export.estimate.roofline import Workload, predict
from export.request.plan import PlanRequest
from export.request.targets import Target

from .tables import titled_table

__all__ = ["policies_document", "policies_table"]


def policies_table(
    request: PlanRequest, targets: Sequence[Target], policies: Sequence[str], efficiency: Efficiency
) -> Table:
    """One line per method."""
    rows = policies_document(request, targets, policies, efficiency)
    headings = [
        heading
        for target in targets
        for heading in (f"{target.name}: attention", "s", f"FPS {efficiency.short}")
    ]
    table = titled_table(
        f"Methods of selection, {request.preset.name} {request.height}x{request.width}, variant "
        f"{request.variant.name}, planned clip (PREDICTED, not measured)",
        *("policy", "keys seen", "in the last chunk", *headings),
    )
    notes = []
    for row in rows:
        mark = ""
        if row["assumption"] is not None:
            notes.append(row["assumption"])
            mark = f" ({len(notes)})"
        figures = []
        for on in row["targets"]:
            known = on["seconds"] is not None
            figures += (
                [f"{on['attention_seconds']:.3g} s", f"{on['seconds']:.3g}", f"{on['fps']:.1f}"]
                if known
                else ["-"] * 3
            )
        table.add_row(row["policy"], f"{row['seen']:.1%}{mark}", f"{row['seen_last']:.1%}", *figures)
    lines = [
        "keys seen: of the resident ones, after the first chunk; attention and s: the clip at 100 % of the published "
        "rates; selection and launches are not counted",
        *(f"({number}) if {escape(note)}" for number, note in enumerate(notes, start=1)),
    ]
    table.caption = "\n".join(lines)
    return table


def policies_document(
    request: PlanRequest, targets: Sequence[Target], policies: Sequence[str], efficiency: Efficiency
) -> list[dict[str, Any]]:
    """The same as plain data."""
    return [_row(request, targets, name, efficiency) for name in policies]


def _row(
    request: PlanRequest, targets: Sequence[Target], name: str, efficiency: Efficiency
) -> dict[str, Any]:
    variant = request.variant.with_policy(name)
    workload = Workload(replace(request, variant=variant))
    later = [workload.visible_blocks(chunk) for chunk in range(1, workload.planned_chunks)]
    share = workload.own_share(workload.planned_chunks - 1)
    row: dict[str, Any] = {
        "policy": name,
        "seen": sum(kept for kept, _ in later) / sum(total for _, total in later),
        "seen_last": later[-1][0] / later[-1][1],
        "assumption": None if share is None else share.assumption,
        "targets": [],
    }
    for target in targets:
        clip = predict(replace(request, target=target, variant=variant))
        row["targets"].append(
            {
                "target": target.name,
                "seconds": None if clip is None else clip.seconds,
                "attention_seconds": None if clip is None else clip.part("self-attention").seconds,
                "fps": None if clip is None else efficiency.fps(clip),
            }
        )
    return row
