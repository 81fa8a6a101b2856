"""Writes a run's weights as half-precision safetensors in the public checkpoints' layouts."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lightforcing_ref.text import umt5_keys

from .config import Run
from .stages import PRESET, StageError, latest_transformer, load_weights
from .text import CaptionEncoder

__all__ = ["FILES", "ship"]

FILES = {
    "transformer": "dit.safetensors",
    "decoder": "vae.safetensors",
    "text": "text_encoder.safetensors",
    "tokenizer": "tokenizer.json",
}


def ship(run: Run, folder: Path, transformer: str | None = None) -> list[Path]:
    """Write transformer, decoder, text encoder (Wan's key layout) and tokenizer to `folder`; returns the files.

    Raises:
        StageError: a stage has no weights yet, or holds values outside half precision's range.
    """
    from safetensors.torch import save_file

    name = transformer or latest_transformer(run, ("hsa", "rollout", "student", "teacher"))
    for stage in (name, "decoder", "text"):
        if not run.weights(stage).exists():
            raise StageError(
                f"{run.weights(stage)} does not exist; run `python -m training run --stage {stage}` first"
            )
    captions = CaptionEncoder.load(PRESET, run.weights("text"))
    names = {key.name: key.wan for key in umt5_keys(PRESET.text.layers)}
    states = {
        "transformer": load_weights(run.weights(name)),
        "decoder": load_weights(run.weights("decoder")),
        "text": {names[key]: value for key, value in captions.weights.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for part, state in states.items():
        path = folder / FILES[part]
        save_file({key: _half(key, value) for key, value in state.items()}, path, {"stage": name})
        written.append(path)
    captions.tokenizer.save(str(folder / FILES["tokenizer"]))
    return [*written, folder / FILES["tokenizer"]]


def _half(key: str, value: Tensor) -> Tensor:
    half = value.to(torch.float16).contiguous()
    if not torch.isfinite(half).all():
        raise StageError(f"{key} holds values outside half precision's range; train with a smaller step size")
    return half
