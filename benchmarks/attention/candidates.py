# mypy: allow-untyped-calls, no-warn-return-any
"""Every image that serves a problem, checked and timed: which one should be the default.

The measuring process may be stopped by any of them: a kernel that reads outside its buffers ends the CUDA context, one
that waits for ever ends nothing. `watch` therefore runs it as a child, takes note of the image it died in or stuck
at, and starts another one behind it. What is measured is in the result file at every moment.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from torch import Tensor

    from plugins.eager.launch import BlockLists, Launcher

    from .inputs import AttentionInputs, Shape
    from .launcher import ImageLauncher

__all__ = ["DONE", "measure_candidates", "table_rows", "watch"]

WRONG = 8e-3
"""Relative L2 error against float64 from which an image is wrong: bfloat16 weights and output cost 3e-3."""
SPARSITIES = (0.9, 0.8, 0.95)
DONE = "done"
PATIENCE_S = 12.0
START_S = 60.0

Row = dict[str, Any]
State = dict[str, Any]


def watch(command: Sequence[str], state_file: Path, budget_s: float, patience_s: float = PATIENCE_S) -> State:
    """Run `command` (the measuring process) until it has measured all, or `budget_s` are over.

    The process keeps `state_file` up to date: `rows`, and `running`, what it is about to run. Whoever ends it or keeps
    it busy for `patience_s` is put into `failed`, with the reason, and left out from then on.

    Raises:
        RuntimeError: the process ended before it measured anything.
    """
    end = time.monotonic() + budget_s
    while True:
        with state_file.with_suffix(".log").open("w+") as log:
            process = subprocess.Popen(command, stderr=log)
            reason = _follow(process, state_file, end, patience_s) or _last_line(log)
        state: State = json.loads(state_file.read_text()) if state_file.exists() else {}
        running = state.get("running", "")
        if running == DONE or time.monotonic() >= end:
            return state
        if not running:
            raise RuntimeError(f"the measuring process ended before it measured anything: {reason}")
        state["failed"] = {**state.get("failed", {}), running: reason}
        state_file.write_text(json.dumps(state))


def _last_line(log: TextIO) -> str:
    log.seek(0)
    lines = log.read().strip().splitlines()
    return lines[-1][:300] if lines else "ended without a message"


def _follow(process: subprocess.Popen[bytes], state_file: Path, end: float, patience_s: float) -> str:
    """Wait for the process while it makes progress; why it was stopped, or nothing if it ended by itself."""
    started = changed = time.monotonic()
    seen = state_file.read_bytes() if state_file.exists() else b""
    moved = False
    while process.poll() is None:
        time.sleep(0.2)
        now = time.monotonic()
        content = state_file.read_bytes() if state_file.exists() else b""
        if content != seen:
            seen, changed, moved = content, now, True
        late = now - changed > patience_s if moved else now - started > START_S
        if late or now >= end:
            process.kill()
            process.wait()
            return "the time was over" if now >= end else f"did not return within {patience_s:.0f} s"
    return ""


def table_rows(state: State, sparsities: Sequence[float]) -> list[list[object]]:
    """Window, blocks, name, then time and efficiency (or what is wrong) at each of `sparsities`."""
    rows = state.get("rows", [])
    dense = {row["window"]: row["best_dense_us"] for row in rows if row["kernel"] == "dense"}
    lines: dict[tuple[object, ...], dict[float, list[object]]] = {}
    for row in rows:
        key = tuple(row.get(k, "") for k in ("window", "block_q", "block_k", "name"))
        cells = lines.setdefault(key, {})
        if row["kernel"] == "dense":
            cells[sparsities[0]] = [row["best_dense_us"], None]
        elif row["kernel"] == "prepare":
            right = row["prepare_us"] is not None
            told = f"{row['terabytes_per_second']:.2f} TB/s" if right else f"{row['error']:.1e}"
            cells[sparsities[0]] = [row["prepare_us"] if right else "wrong", told]
        elif row["kernel"] == "select":
            cells[row["sparsity"]] = [row["select_us"], None]
        elif row["attend_us"] is None:
            cells[row["sparsity"]] = ["wrong", f"{row['error']:.1e}"]
        else:
            kept = row["kept_blocks"] / row["resident_blocks"]
            best = dense.get(row["window"])
            cells[row["sparsity"]] = [row["attend_us"], best and best * kept / row["attend_us"]]
    return [
        [*key, *(cell for s in sparsities for cell in cells.get(s, [None, None]))]
        for key, cells in lines.items()
    ]


def measure_candidates(
    images: Path, windows: Sequence[tuple[str, int]], blocks: Sequence[tuple[int, int]], state: State,
    keep: Callable[[State], object],
) -> None:  # fmt: skip
    """Fill `state["rows"]` with one row for each window, block size, image and sparsity; `keep` saves the state.

    Rows that are there already and images in `state["failed"]` are left out.

    Args:
        images: the folder that `python -m plugins build` wrote.
        windows: names and numbers of past frames.
        blocks: query and key blocks.
    """
    from .inputs import Shape
    from .launcher import ImageLauncher

    rows: list[Row] = state.setdefault("rows", [])
    failed: dict[str, str] = state.setdefault("failed", {})

    def run(name: str, work: Callable[[], list[Row]], about: Row) -> None:
        label = " ".join(map(str, (name, *about.values())))
        if any(row["name"] == name and about.items() <= row.items() for row in rows):
            return
        if name in {key.split()[0] for key in failed}:
            return
        state["running"] = label
        keep(state)
        found = work()
        rows.extend({"name": name, **about, **row} for row in found)
        keep(state)

    launcher = ImageLauncher(images, warm_up=False)  # one that does not load is a row, not the end
    for block_q, block_k in blocks:
        shape = Shape(1536, 0, block_q, block_k)
        about: Row = {"kernel": "prepare", "block_q": block_q, "block_k": block_k}
        for name in launcher.names("prepare", shape.problem):
            run(name, partial(_prepare_rows, launcher.preferring(name), shape), about)
    for window, past in windows:
        about = {"kernel": "dense", "window": window}
        run("dense", partial(_dense_rows, Shape(1536, past, *blocks[0])), about)
        for block_q, block_k in blocks:
            shape = Shape(1536, past, block_q, block_k)
            about = {"kernel": "attend", "window": window, "block_q": block_q, "block_k": block_k}
            case = _Case(launcher, shape)
            run("select", case.select_rows, {**about, "kernel": "select"})
            for name in launcher.names("attend", shape.problem):
                run(name, partial(case.attend_rows, launcher.preferring(name)), about)
    state["running"] = DONE
    keep(state)


def _prepare_rows(launcher: Launcher, shape: Shape) -> list[Row]:
    from plugins.eager.launch import TorchKernels

    from .timing import measure_prepare

    row = measure_prepare(TorchKernels(launcher), shape)
    return [row if row["error"] < WRONG else {**row, "prepare_us": None}]


def _dense_rows(shape: Shape) -> list[Row]:
    from .timing import dense_baselines, input_sets

    found = dense_baselines(input_sets(shape), shape.head_dim**-0.5)
    times = [time for time in found.values() if isinstance(time, float)]
    return [{"dense_us": found, "best_dense_us": min(times, default=None), "flops": shape.dense_flops()}]


class _Case:
    """One shape: its inputs, lists at every sparsity, and what head 0 and the last one should come to."""

    def __init__(self, launcher: ImageLauncher, shape: Shape) -> None:
        self._launcher, self._shape = launcher, shape

    @cached_property
    def _sets(self) -> list[AttentionInputs]:
        from .timing import input_sets

        return input_sets(self._shape)

    @cached_property
    def _selected(self) -> dict[float, list[BlockLists]]:
        from plugins.eager.launch import TorchKernels
        from plugins.eager.policies import HSAPolicy

        from .timing import HSA_SHORT

        kernels = TorchKernels(self._launcher)
        return {
            sparsity: [
                HSAPolicy(kernels, **HSA_SHORT, keep_q20=self._shape.keep_q20(sparsity)).select(s.chunk)
                for s in self._sets
            ]
            for sparsity in SPARSITIES
        }

    @cached_property
    def _exact(self) -> dict[float, dict[int, Tensor]]:
        from plugins.eager.policies import mask_from_lists

        from .timing import exact_head

        shape, inputs = self._shape, self._sets[0]
        heads = (0, shape.heads - 1)
        masks = {
            sparsity: mask_from_lists(lists[0], shape.k_blocks, shape.resident)
            for sparsity, lists in self._selected.items()
        }
        return {
            sparsity: {head: exact_head(inputs, mask, shape, head) for head in heads}
            for sparsity, mask in masks.items()
        }

    def select_rows(self) -> list[Row]:
        """*score* and *select* at each sparsity."""
        from benchmarks.timing import microseconds
        from plugins.eager.launch import TorchKernels

        from .timing import HSA_SHORT, Steps

        kernels, rows = TorchKernels(self._launcher), []
        for sparsity, lists in self._selected.items():
            keep = self._shape.keep_q20(sparsity)
            steps = [Steps(kernels, self._shape, s, one) for s, one in zip(self._sets, lists, strict=True)]
            select_us = microseconds([step.select(HSA_SHORT, keep) for step in steps])
            rows.append({"sparsity": sparsity, "select_us": select_us})
        return rows

    def attend_rows(self, launcher: Launcher) -> list[Row]:
        """*attend* at each sparsity: its error, and its time if it is right."""
        from benchmarks.timing import microseconds
        from plugins.eager.launch import TorchKernels

        from .timing import Steps, relative

        kernels, rows = TorchKernels(launcher), []
        for sparsity, lists in self._selected.items():
            steps = [Steps(kernels, self._shape, s, one) for s, one in zip(self._sets, lists, strict=True)]
            own = TorchKernels(self._launcher)
            default = Steps(own, self._shape, self._sets[0], lists[0])
            steps[0].out.fill_(float("nan"))
            for step in (default, steps[0]):
                step.attend()()
            errors = [relative(steps[0].out[:, h], want) for h, want in self._exact[sparsity].items()]
            row: Row = {
                "sparsity": sparsity,
                "kept_blocks": float(lists[0].counts.float().mean()),
                "resident_blocks": self._shape.resident,
                "error": max(errors),
                "difference": relative(steps[0].out, default.out),
            }
            right = row["error"] < WRONG and row["difference"] < WRONG  # a NaN is not
            row["attend_us"] = microseconds([step.attend() for step in steps]) if right else None
            rows.append(row)
        return rows
