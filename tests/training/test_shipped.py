"""What the shipped checkpoint reaches, held as floors.

The targets are those of docs/tiny_model.md; where a figure has not come so far, the floor is a little below what has
been measured.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import quality
from lightforcing_ref.checkpoint import load_vae_state
from lightforcing_ref.config import PRESETS
from lightforcing_ref.vae import VAEDecoder, to_uint8
from training.cli import ASSETS
from training.data import random_clip
from training.latents import PatchPCA
from training.ship import FILES

DECODER_PSNR = 27.0
"""In dB; a little below what docs/tiny_model.md reports."""
TARGETS = {"colour": 0.95, "shape": 0.85, "motion": 0.80, "held_out_all": 0.60}
"""Fractions of clips: what the model is meant to reach, dense and sparse."""
REACHED = {
    "dense": {"colour": 0.95, "shape": 0.45, "motion": 0.80, "held_out_all": 0.40},
    "finetuned-dense": {"colour": 0.85, "shape": 0.30, "motion": 0.65, "held_out_all": 0.30},
    "finetuned-hsa": {"colour": 0.80, "shape": 0.30, "motion": 0.65, "held_out_all": 0.30},
}
"""Floors by row; below the targets where the checkpoint is. A clip in sixteen is 6 points."""


def needs(part: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not (ASSETS / FILES[part]).exists(), reason=f"no {part} is shipped yet")


@needs("decoder")
def test_the_shipped_files_are_small() -> None:
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) < 16 * 2**20


@needs("decoder")
def test_the_decoder_reconstructs_clips() -> None:
    preset = PRESETS["tiny"]
    decoder = VAEDecoder(preset.vae)
    decoder.load_state_dict(load_vae_state(ASSETS / FILES["decoder"], preset.vae, dtype=torch.float32))
    pca = PatchPCA.load(ASSETS / FILES["latents"])
    generator = np.random.default_rng(21)
    errors = []
    for _ in range(2):
        frames = random_clip(generator).render(20, 9)
        with torch.no_grad():
            video = to_uint8(decoder.decode(torch.from_numpy(pca.encode(frames)))).numpy()
        errors.append(np.square(video.astype(np.float64) - frames).mean())
    assert 10 * np.log10(255**2 / np.mean(errors)) > DECODER_PSNR


def test_no_floor_is_above_its_target() -> None:
    for floors in REACHED.values():
        assert floors.keys() == TARGETS.keys()
        assert all(floors[name] <= target for name, target in TARGETS.items())


@pytest.mark.slow
@needs("transformer")
def test_rollouts_are_as_good_as_they_were(tmp_path: Path) -> None:
    tuned = "dense,hsa"
    arguments = ["--prompts", "16", "--rows", "dense", "--finetuned-rows", tuned, "--out", str(tmp_path)]
    assert quality.main(arguments) == 0
    rows = json.loads((tmp_path / "quality.json").read_text())["rows"]
    for row, floors in REACHED.items():
        for name, floor in floors.items():
            found = rows[row]["summary"][name]
            assert found >= floor, f"{name} of {row} is {found:.0%}; it was at least {floor:.0%}"
