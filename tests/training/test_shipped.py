"""What the shipped checkpoint reaches, held as floors.

Rollouts have to reach the targets below, and finetuned sparse ones must come within 5 points of dense ones. Until a
transformer is shipped that check is skipped; docs/tiny_model.md says how far training has come.
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
"""Fractions of clips, dense rollout."""


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


@pytest.mark.slow
@needs("transformer")
def test_rollouts_reach_the_targets(tmp_path: Path) -> None:
    assert quality.main(["--prompts", "16", "--rows", "dense", "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "quality.json").read_text())["rows"]["dense"]["summary"]
    for name, target in TARGETS.items():
        assert summary[name] >= target, f"{name} is {summary[name]:.0%}; the target is {target:.0%}"
