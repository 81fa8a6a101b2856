"""Measures what a checkpoint generates: `python -m benchmarks.quality`.

Prompts (half of them combinations that training never saw) x seeds, for each row: the dense rollout, selection
policies at equal sparsity, fp8 and nvfp4 linears, built bundles. Scores come from a parser of the frames, not from
another model.

What this shows: whether a lossy step (sparsity, a policy, reduced precision, a backend) changes what the tiny model
does on synthetic shapes. What it cannot show: how natural video of the 1.3B model looks under that step. Its budget
is 2 key blocks a frame, not 24, and its content has no texture.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.data.clips import Clip

    from .rows import Frames, Row

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
        help="policies, comma-separated, each alone or with a precision (hsa+fp8); dense comes first in any case",
    )  # fmt: skip
    parser.add_argument(
        "--finetuned-rows",
        default="dense,hsa,hsa+fp8,hsa+nvfp4",
        help="the same for the transformer that was finetuned under sparse attention, dit.safetensors; the rows "
        "above run dit_dense.safetensors, which was not",
    )
    parser.add_argument(
        "--bundle", action="append", default=[], metavar="NAME=PATH", help="add a built bundle as a row"
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
    from runtime.bundle import load_bundle

    from .rows import BundleRow, Weights, reference_row

    names = [name for name in options.rows.split(",") if name]
    names = ["dense", *(name for name in names if name != "dense")]
    weights = Weights.load(options.weights, PRESETS["tiny"], "dit_dense.safetensors")
    rows: list[Row] = [reference_row(name, weights, long=options.long) for name in names]
    tuned_names = [name for name in options.finetuned_rows.split(",") if name]
    if tuned_names:
        tuned = Weights.load(options.weights, PRESETS["tiny"])
        rows += [reference_row(name, tuned, long=options.long, label="finetuned-") for name in tuned_names]
    for item in options.bundle:
        name, _, path = item.partition("=")
        if not path:
            raise ValueError(f"--bundle is {item!r}; expected NAME=PATH, e.g. demo=engines/built/demo")
        load_bundle(path)  # a wrong path is told before the first clip
        rows.append(BundleRow(name, Path(path)))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parser().parse_args(arguments)
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from lightforcing_ref.errors import CheckpointError
    from runtime.errors import BundleError

    from .report import write_report
    from .scores import ClipScore, score

    torch.set_num_threads(options.threads)
    console = Console()
    try:
        rows = _rows(options)
    except (BundleError, CheckpointError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    clips = prompts(options.prompts, options.kinds.split(","))
    chunks = LONG_CHUNKS if options.long else CHUNKS
    scores: dict[str, list[ClipScore]] = {row.name: [] for row in rows}
    sheets: dict[str, list[Frames]] = {row.name: [] for row in rows}
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("clips", total=len(clips) * options.seeds * len(rows))
        for clip in clips:
            for seed in range(options.seeds):
                dense = None
                for row in rows:
                    frames = row.generate(clip.caption, seed, chunks)
                    scores[row.name].append(score(frames, clip, seed, dense))
                    dense = frames if dense is None else dense
                    if len(sheets[row.name]) < SHEET_CLIPS:
                        sheets[row.name].append(frames)
                    progress.advance(task)
    settings = {
        "weights": options.weights.name,
        "prompts": options.prompts,
        "seeds": options.seeds,
        "chunks": chunks,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    console.print(write_report(options.out, scores, sheets, settings), markup=False, soft_wrap=True)
    return 0
