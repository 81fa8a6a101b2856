"""Command line of the training: `run` stages, `status` of a run, `ship` the weights."""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from runtime.terminal import BAD_INPUT, console, run_command, say

from .config import CONFIGS, STAGES, ConfigError, Run, StageName, TrainingConfig

__all__ = ["main"]

ASSETS = Path(__file__).parent.parent / "lightforcing_ref" / "assets" / "tiny"
LINE_SECONDS = 20.0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("--config", default="cpu", help="name in training/configs, or a TOML file")
    parser.add_argument("--run", type=Path, help="folder of the run (default: training/runs/<config>)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run one stage, or all that are not finished; resumes by itself")
    run.add_argument("--stage", choices=[*STAGES, "all"], required=True)
    run.add_argument(
        "--minutes",
        type=float,
        help="training time of the stage in all, earlier sittings included (default: as configured)",
    )
    commands.add_parser("status", help="what each stage has reached")
    ship = commands.add_parser(
        "ship", help="write the weights in half precision where the toolchain finds them, over what is there"
    )
    ship.add_argument(
        "--transformer", choices=("still", "student", "rollout", "hsa", "none"), help="default: the latest"
    )
    ship.add_argument("--to", type=Path, default=ASSETS, help="default: %(default)s")
    adopt = commands.add_parser("adopt", help="begin a new run from shipped weights")
    adopt.add_argument("--of", type=Path, default=ASSETS, help="folder that `ship` wrote")
    return parser


def _load(name: str) -> tuple[TrainingConfig, str]:
    path = CONFIGS / f"{name}.toml" if not name.endswith(".toml") else Path(name)
    return TrainingConfig.load(path), path.stem


class _Reporter:
    """A progress bar on a terminal, a line now and then elsewhere."""

    def __init__(self, stage: str, console: Console) -> None:
        self.stage, self.console = stage, console
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console
        )
        self.task = self.progress.add_task(stage, total=1.0)
        self.last = 0.0

    def __call__(self, line: str, fraction: float) -> None:
        if self.console.is_terminal:
            self.progress.update(self.task, completed=fraction, description=f"{self.stage}: {line}")
        elif time.monotonic() - self.last > LINE_SECONDS or fraction >= 1:
            self.last = time.monotonic()
            self.console.print(f"{self.stage} {fraction:.0%} {line}")

    def __enter__(self) -> _Reporter:
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.progress.stop()


def _run(stage: StageName, config: TrainingConfig, run: Run, minutes: float | None, console: Console) -> None:
    from training.stages import run as stages

    with _Reporter(stage, console) as report:
        stages.run(stage, config, run, minutes=minutes, report=report)


def _status(run: Run, console: Console) -> None:
    for stage in STAGES:
        curve = run.stage(stage) / "curve.csv"
        if curve.exists():
            with curve.open(newline="") as file:
                rows = list(csv.DictReader(file))
            if rows:
                recent = [float(row["loss"]) for row in rows[-100:]]
                minutes = float(rows[-1]["seconds"]) / 60
                mean = sum(recent) / len(recent)
                console.print(f"{stage}: {len(rows)} steps, {minutes:.1f} min, loss {mean:.4f} (last 100)")
                continue
        console.print(f"{stage}: {'done' if any(run.stage(stage).glob('*')) else 'not started'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parser().parse_args(arguments)
    return run_command(
        lambda: _work(options),
        say,
        expected=_expected,
        install="pip install '.[train]'",
        debug=options.debug,
        left=lambda: "what was trained is kept: the same command goes on",
    )


def _expected(error: Exception) -> int | None:
    from training.stages.run import StageError

    return BAD_INPUT if isinstance(error, (ConfigError, FloatingPointError, StageError)) else None


def _work(options: argparse.Namespace) -> int:
    notes = console()
    config, name = _load(options.config)
    run = Run(options.run or Path(__file__).parent / "runs" / name)
    if options.command == "status":
        _status(run, notes)
    elif options.command == "ship":
        from .ship import ship

        for path in ship(run, options.to, options.transformer):
            notes.print(f"{path} {path.stat().st_size / 2**20:.2f} MiB")
    elif options.command == "adopt":
        from .ship import adopt

        notes.print(f"{run.folder} starts with: {', '.join(adopt(run, options.of))}")
    else:
        for stage in STAGES if options.stage == "all" else (options.stage,):
            _run(stage, config, run, options.minutes, notes)
    return 0
