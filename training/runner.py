# mypy: allow-untyped-calls, no-warn-return-any
"""Drives one optimised stage: wall-time budget, step-size schedule, averaged weights, checkpoints, curve, progress."""

from __future__ import annotations

import csv
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from runtime import atomic_output

from .config import StageConfig
from .optim import MuonAdam

__all__ = ["Stage", "progress_factor", "run_stage", "save_tensors"]

CHECKPOINT_SECONDS = 60.0


class Stage(ABC):
    """What a stage adds to the loop.

    `module` holds everything that is trained. What the stage hands to the next one is its state dict, or the part of it
    below `handed_on`, where there are helpers that serve training only.
    """

    name: str
    module: nn.Module
    adam_only: tuple[str, ...] = ()
    handed_on: str = ""

    @abstractmethod
    def loss(self, generator: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        """Draw a batch and compute its loss and figures for the curve. Torch's own generator is seeded per step."""


def progress_factor(config: StageConfig, step: int, elapsed: float) -> float:
    """Step-size factor at `step`, `elapsed` seconds into the stage's budget."""
    done = max(step / config.steps, elapsed / (60 * config.minutes))
    rise = min(1.0, (step + 1) / (config.warmup + 1))
    fall = min(1.0, max(0.0, (1 - done) / config.decay)) if config.decay else 1.0
    return rise * fall


class _Average:
    """Exponential average of the weights; short at first so that it forgets the initial values."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in module.state_dict().items():
            self.values[name].lerp_(value, 1 - decay)


class _Curve:
    """The CSV of figures; resuming drops rows after the checkpoint."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) < step]
        self.fields: list[str] = list(rows[0]) if rows else []
        if self.fields:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.fields)
                writer.writeheader()
                writer.writerows(rows)

    def add(self, row: Mapping[str, float]) -> None:
        is_new = not self.fields
        if is_new:
            self.fields = list(row)
        with self.path.open("w" if is_new else "a", newline="") as file:
            writer = csv.DictWriter(file, self.fields)
            if is_new:
                writer.writeheader()
            writer.writerow({key: f"{value:.6g}" for key, value in row.items()})


def run_stage(
    stage: Stage,
    config: StageConfig,
    folder: Path,
    *,
    seed: int,
    report: Callable[[str, float], None] | None = None,
) -> int:
    """Train until the budget is used up, from the last checkpoint if there is one.

    Every step draws from generators keyed by (seed, step), so that a resumed run sees what an uninterrupted one would.

    Args:
        report: called after each step with a line of figures and the fraction of the budget that is used.

    Returns:
        the number of steps taken in all.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = MuonAdam(stage.module, lr=config.lr, adam_lr=config.adam_lr, adam_only=stage.adam_only)
    average = _Average(stage.module, config.ema)
    step, before = 0, 0.0
    state_file = folder / "state.pt"
    if state_file.exists():
        state: dict[str, Any] = torch.load(
            state_file, weights_only=True, map_location=torch.get_default_device()
        )
        stage.module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        optimizer.set_base(config.lr, config.adam_lr)  # as configured now, not as saved
        average.values = state["average"]
        step, before = state["step"], state["elapsed"]
    curve = _Curve(folder / "curve.csv", step)
    start = saved = time.monotonic()

    def elapsed() -> float:
        return before + time.monotonic() - start

    def checkpoint() -> None:
        content = {
            "module": stage.module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "average": average.values,
            "step": step,
            "elapsed": elapsed(),
        }
        with atomic_output(state_file) as path:
            torch.save(content, path)
        prefix = stage.handed_on
        kept = {k.removeprefix(prefix): v for k, v in average.values.items() if k.startswith(prefix)}
        with atomic_output(folder / "weights.safetensors") as path:
            save_tensors(kept, path)

    while step < config.steps and elapsed() < 60 * config.minutes:
        torch.manual_seed(hash((seed, step)) & 0x7FFFFFFF)
        factor = progress_factor(config, step, elapsed())
        optimizer.set_progress(factor)
        optimizer.zero_grad()
        loss, figures = stage.loss(np.random.default_rng([seed, step]))
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss of {stage.name} is {loss.item()} at step {step}; lower lr or adam_lr and resume"
            )
        loss.backward()
        norm = nn.utils.clip_grad_norm_(stage.module.parameters(), config.clip)
        optimizer.step()
        average.update(stage.module, step)
        row = {
            "step": float(step),
            "seconds": elapsed(),
            "loss": loss.item(),
            "grad": float(norm),
            "lr": factor,
        }
        curve.add(row | figures)
        step += 1
        if report is not None:
            line = f"step {step} loss {loss.item():.4f} " + " ".join(
                f"{k} {v:.3g}" for k, v in figures.items()
            )
            report(line, max(step / config.steps, elapsed() / (60 * config.minutes)))
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            checkpoint()
            saved = time.monotonic()
    checkpoint()
    return step


def save_tensors(values: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors by name as safetensors."""
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in values.items()}, path)
