"""What the rollout benchmark leaves: goals, a table, two plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.kernel_classes import CLASSES

__all__ = ["Goal", "goals", "plot", "table"]

Result = Mapping[str, Any]
"""A case of the result file: `preset`, `height`, `width`, `asked_frames`, `rungs`."""

GOAL_DEVICE, GOAL_PRESET, GOAL_SIZE = "H200", "wan-1.3b", (512, 768)


@dataclass(frozen=True)
class Goal:
    """A figure of the last rung that has to stay below (or above) a limit."""

    name: str
    unit: str
    limit: float
    at_least: bool
    is_long: bool
    figure: Callable[[Mapping[str, Any]], float | None]

    def reached(self, figure: float) -> bool:
        return figure >= self.limit if self.at_least else figure <= self.limit


def _drift(rung: Mapping[str, Any]) -> float | None:
    flat = rung.get("flatness")
    return None if flat is None else abs(float(flat["drift_percent"]))


GOALS = (
    Goal("latency of 81 frames", "s", 0.8, False, False, lambda rung: rung.get("latency_s")),
    Goal("speed over rung 0", "times", 5.0, True, False, lambda rung: rung.get("ratio_to_rung_0")),
    Goal("first frames from the encoded prompt", "s", 0.15, False, False, lambda rung: rung.get("first_frames_s")),
    Goal("chunk 40 against chunk 8, long mode", "%", 2.0, False, True, _drift),
    Goal("runtime overhead", "%", 1.0, False, False, lambda rung: rung.get("overhead_percent")),
)  # fmt: skip


def goals(cases: Sequence[Result], device: str) -> list[dict[str, Any]]:
    """Each goal as met, not met or unmeasured. They are for an H200, the real model and the last rung; elsewhere the
    figure is given all the same.
    """
    result = []
    for goal in GOALS:
        fitting = [case for case in cases if (case["asked_frames"] > 81) == goal.is_long]
        right = [c for c in fitting if (c["preset"], c["height"], c["width"]) == (GOAL_PRESET, *GOAL_SIZE)]
        case = next(iter((*right, *fitting)), None)
        rung = _last_rung(case)
        figure = None if rung is None else goal.figure(rung)
        counts = bool(right) and GOAL_DEVICE in device and rung is not None and rung["number"] == 6
        status = (
            "unmeasured" if figure is None or not counts else "met" if goal.reached(figure) else "not met"
        )
        about = None if case is None else f"{case['preset']}, {case['height']}x{case['width']}, {device}"
        result.append(
            {
                "goal": goal.name,
                "limit": f"{'>=' if goal.at_least else '<='} {goal.limit:g} {goal.unit}",
                "figure": figure,
                "rung": None if rung is None else rung["number"],
                "measured_on": about,
                "status": status,
            }
        )
    return result


def _last_rung(case: Result | None) -> Mapping[str, Any] | None:
    measured = [rung for rung in case["rungs"] if rung["status"] == "measured"] if case else []
    return measured[-1] if measured else None


def _cell(value: object, digits: int = 3) -> str:
    if isinstance(value, float):
        return f"{value:.{digits}f}" if abs(value) < 100 else f"{value:.0f}"
    return "-" if value is None else str(value)


def _row(rung: Mapping[str, Any]) -> list[str]:
    if rung["status"] != "measured":
        return [str(rung["number"]), rung["name"], rung["status"], *[""] * 8]
    chunks, memory = rung["chunk_s"], rung["memory"]["total_bytes"]
    inspection = rung["inspection"]
    syncs = inspection["host_syncs"]
    return [
        str(rung["number"]),
        rung["name"],
        str(rung["precision"]),
        _cell(rung["latency_s"]),
        _cell(rung["fps"], 1),
        _cell(rung["first_frames_s"]),
        _cell(chunks[-1]),
        _cell(memory / 2**30, 2),
        _cell(None if syncs is None else sum(syncs.values())),
        _cell(rung["overhead_percent"], 2),
        _cell(rung["ratio_to_rung_0"], 2),
    ]


_COLUMNS = (
    "",
    "rung",
    "type",
    "clip s",
    "FPS",
    "first s",
    "last chunk s",
    "GiB",
    "syncs",
    "overhead %",
    "ratio",
)


def table(cases: Sequence[Result], reached: Sequence[Mapping[str, Any]]) -> str:
    """The short table, one block for each case, then why rungs are missing, then the goals."""
    lines: list[str] = []
    for case in cases:
        rows = [list(_COLUMNS), *(_row(rung) for rung in case["rungs"])]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
        lines.append(f"{case['preset']}, {case['height']}x{case['width']}, {case['frames']} frames")
        for row in rows:
            cells = [
                text.ljust(width) if i == 1 else text.rjust(width)
                for i, (text, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        lines += [f"  rung {r['number']}: {r['reason']}" for r in case["rungs"] if r.get("reason")]
    for goal in reached:
        lines.append(f"goal: {goal['goal']} {goal['limit']}: {_cell(goal['figure'])}, {goal['status']}")
    return "\n".join(lines)


def plot(cases: Sequence[Result], stem: Path, title: str) -> list[Path]:
    """Write the bar chart and the per-chunk plot; nothing where matplotlib is missing or nothing was measured."""
    cases = [case for case in cases if _last_rung(case)]
    try:
        import matplotlib
    except ImportError:
        return []
    if not cases:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    def figure(height: float) -> Any:
        made, axes = pyplot.subplots(
            1, len(cases), figsize=(6.5 * len(cases), height), squeeze=False, layout="constrained"
        )
        made.suptitle(title)
        for axis, case in zip(axes[0], cases, strict=True):
            axis.set_title(f"{case['height']}x{case['width']}, {case['frames']} frames")
        return made, axes[0]

    bars, axes = figure(3.6)
    for axis, case in zip(axes, cases, strict=True):
        _bars(axis, [rung for rung in case["rungs"] if rung["status"] == "measured"])
    chunks, axes = figure(3.6)
    for axis, case in zip(axes, cases, strict=True):
        for rung in case["rungs"]:
            if rung["status"] == "measured":
                times = (rung.get("flatness") or rung)["chunk_s"]
                axis.plot(range(len(times)), times, marker=".", label=f"{rung['number']}: {rung['name']}")
        axis.set(xlabel="chunk", ylim=(0, None))
    axes[0].set_ylabel("time of a chunk [s]")
    axes[0].legend(fontsize=7)
    paths = []
    for made, name in ((bars, "ladder"), (chunks, "chunks")):
        paths.append(stem.with_name(f"{stem.name}-{name}.png"))
        made.savefig(paths[-1], dpi=90)
        pyplot.close(made)
    return paths


def _bars(axis: Any, rungs: Sequence[Mapping[str, Any]]) -> None:
    """Latency of each rung, cut by kernel class where the profiler saw them."""
    names = [f"{rung['number']}: {rung['name']}" for rung in rungs]
    left = [0.0] * len(rungs)
    for index, kind in enumerate(CLASSES):
        widths = [(rung["inspection"]["shares"] or {}).get(kind, 0.0) * rung["latency_s"] for rung in rungs]
        axis.barh(names, widths, left=left, color=f"C{index}", label=kind)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    rest = [rung["latency_s"] if rung["inspection"]["shares"] is None else 0.0 for rung in rungs]
    axis.barh(names, rest, left=left, color="lightgrey", label="not told apart")
    for row, rung in enumerate(rungs):
        axis.text(rung["latency_s"], row, f" {rung['latency_s']:.2f} s", va="center", fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.15 * max(rung["latency_s"] for rung in rungs))
    axis.set_xlabel("latency of the clip [s]")
    axis.legend(fontsize=6, loc="lower right")
