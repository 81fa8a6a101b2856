"""Measures what a checkpoint generates: `python -m benchmarks.quality`.

Prompts (half of them combinations that training never saw) x seeds, for each row: the dense rollout, selection
policies at equal sparsity, other schedules, fp8 and nvfp4 linears, built bundles. Scores come from a parser of the
frames, not from another model. Every clip is written down when it is done: the same command goes on where it was
interrupted, and adds rows and prompts to what is there.

What this shows: whether a lossy step (sparsity, a policy, reduced precision, a backend) changes what the tiny model
does on synthetic shapes. What it cannot show: how natural video of the 1.3B model looks under that step. Its budget
is 2 key blocks a frame, not 24, and its content has no texture.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.data.clips import Clip

    from .ledger import Frames, Key, Ledger
    from .rows import Row

__all__ = ["main", "prompts"]

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "lightforcing_ref" / "assets" / "tiny"
RESULTS = ROOT / "benchmarks" / "results" / "quality"
CHUNKS = 7
LONG_CHUNKS = 40
SHEET_CLIPS = 3


def prompts(count: int, kinds: Sequence[str], seed: int = 0) -> list[Clip]:
    """`count` clips spread over everything that captions vary, alternately trained and held-out combinations."""
    import numpy as np

    from training.data.clips import random_clip

    generator = np.random.default_rng([seed, 11])
    return [
        random_clip(generator, [kinds[index // 2 % len(kinds)]], held_out=bool(index % 2), jitter=0.0)
        for index in range(count)
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of a shipped checkpoint")
    parser.add_argument(
        "--rows",
        default="dense,dense+fp8,dense+nvfp4,hsa,hsa-uniform,top-k,top-k-uniform,nearest,nearest-uniform,random",
        help="policies and schedules, comma-separated, each alone or with a precision (hsa+fp8); dense comes first in "
        "any case",
    )  # fmt: skip
    parser.add_argument(
        "--policies",
        help="instead of --rows and --finetuned-rows: methods of selection, comma-separated, or all of the field",
    )
    parser.add_argument(
        "--finetuned-rows",
        default="dense,hsa,hsa+fp8,hsa+nvfp4",
        help="the same for the transformer that was finetuned under sparse attention, dit.safetensors; the rows "
        "above run dit_dense.safetensors, which was not",
    )
    parser.add_argument(
        "--trained",
        action="append",
        default=[],
        metavar="NAME=FILE:ROWS",
        help="add rows of another transformer, named NAME-ROW, e.g. "
        "tuned=training/runs/cpu/framewise/weights.safetensors:framewise,framewise-2step",
    )
    parser.add_argument(
        "--bundle", action="append", default=[], metavar="NAME=PATH", help="add a built bundle as a row"
    )
    parser.add_argument(
        "--against",
        default="dense",
        metavar="ROW",
        help="row that PSNR and SSIM compare with (default: %(default)s)",
    )
    parser.add_argument(
        "--kinds", default="moves,bounces,orbits,grows", help="kinds of motion, comma-separated"
    )
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=1, help="seeds per prompt")
    parser.add_argument("--long", action="store_true", help=f"{LONG_CHUNKS} chunks within a sliding window")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=1)
    return parser


def _rows(options: argparse.Namespace) -> list[Row]:
    from lightforcing_ref.config import PRESETS

    from .policies import METHODS
    from .rows import BundleRow, Weights, reference_row

    asked, tuned_rows = options.rows, options.finetuned_rows
    if options.policies is not None:
        asked, tuned_rows = ",".join(METHODS) if options.policies == "all" else options.policies, ""
    names = [name for name in asked.split(",") if name]
    names = ["dense", *(name for name in names if name != "dense")]
    weights = Weights.load(options.weights, PRESETS["tiny"], "dit_dense.safetensors")
    rows: list[Row] = [reference_row(name, weights, long=options.long) for name in names]
    tuned_names = [name for name in tuned_rows.split(",") if name]
    if tuned_names:
        tuned = Weights.load(options.weights, PRESETS["tiny"])
        rows += [reference_row(name, tuned, long=options.long, label="finetuned-") for name in tuned_names]
    for item in options.trained:
        label, _, rest = item.partition("=")
        path, _, listed = rest.rpartition(":")
        if not (label and path and listed):
            raise ValueError(
                f"--trained is {item!r}; expected NAME=FILE:ROWS, e.g. tuned=dit.safetensors:framewise"
            )
        trained = Weights.load(options.weights, PRESETS["tiny"], str(Path(path).resolve()))
        rows += [
            reference_row(name, trained, long=options.long, label=f"{label}-") for name in listed.split(",")
        ]
    for item in options.bundle:
        name, _, path = item.partition("=")
        if not path:
            raise ValueError(f"--bundle is {item!r}; expected NAME=PATH, e.g. demo=engines/built/demo")
        rows.append(BundleRow(name, Path(path)))
    if options.against not in (row.name for row in rows):
        known = ", ".join(row.name for row in rows)
        raise ValueError(f"--against is {options.against!r}; expected one of the rows: {known}")
    return rows


def _frames(ledger: Ledger, row: Row, key: Key) -> Frames:
    """A clip's frames, made now unless they were kept."""
    frames = ledger.frames(key)
    if frames is None:
        frames = row.generate(key.caption, key.seed, key.chunks)
        ledger.keep(key, frames)
    return frames


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parser().parse_args(arguments)
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from lightforcing_ref.errors import CheckpointError
    from runtime.errors import BundleError

    from .ledger import Key, Ledger
    from .report import Line, write_report
    from .scores import score

    torch.set_num_threads(options.threads)
    console = Console()
    try:
        rows = _rows(options)
    except (BundleError, CheckpointError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    clips = prompts(options.prompts, options.kinds.split(","))
    chunks = LONG_CHUNKS if options.long else CHUNKS
    ledger = Ledger(options.out)
    lines = [Line(row.name) for row in rows]
    original = next(row for row in rows if row.name == options.against)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("clips", total=len(clips) * options.seeds * len(rows))
        for clip, seed in product(clips, range(options.seeds)):
            keys = {
                row.name: Key(row.name, row.identity, original.identity, clip.caption, seed, chunks)
                for row in rows
            }
            for row, line in zip(rows, lines, strict=True):
                key = keys[row.name]
                found = ledger.score(key)
                if found is None:
                    frames = _frames(ledger, row, key)
                    compared = None if row is original else _frames(ledger, original, keys[original.name])
                    found = score(frames, clip, seed, compared)
                    ledger.add(key, found, row.share)
                line.scores.append(found)
                line.share = ledger.share(row.name, row.identity)
                if len(line.sheet) < SHEET_CLIPS:
                    line.sheet.append(_frames(ledger, row, key))
                progress.advance(task)
    settings = {
        "command": shlex.join(
            ["python", "-m", "benchmarks.quality", *(sys.argv[1:] if arguments is None else arguments)]
        ),
        "weights": options.weights.name,
        "against": options.against,
        "prompts": options.prompts,
        "seeds": options.seeds,
        "chunks": chunks,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    console.print(write_report(options.out, lines, settings), markup=False, soft_wrap=True)
    return 0
