"""Decoders side by side: what is counted is counted right, and what is compared is compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.decoders import WEIGHTS, main

EQUAL = 99
"""PSNR of frames that are equal."""
VAE = WEIGHTS / "vae.safetensors"


def test_trained_decoders_have_a_psnr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "decoders.json"
    arguments = ["--clips", "1", "--frames", "2", "--rounds", "1", "--out", str(out)]
    assert main([*arguments, "--decoder", f"one={VAE}", "--decoder", f"again={VAE}"]) == 0
    one, again = json.loads(out.read_text())["rows"]
    assert one["psnr"] == again["psnr"] > 28
    assert (one["psnr_to_first"], again["psnr_to_first"]) == (None, EQUAL)
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_random_ones_have_none(tmp_path: Path) -> None:
    out = tmp_path / "decoders.json"
    arguments = ["--resolution", "64x32", "--frames", "2", "--rounds", "2", "--out", str(out)]
    assert main([*arguments, "--decoder", "tiny-tae"]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["psnr"], row["psnr_to_first"], len(row["seconds"])) == (None, None, 2)
    # Three blocks each of 16 channels at 8x4, and of 8 at 16x8 and 32x16, in float32.
    assert row["cache_bytes"] == 4 * 3 * (16 * 8 * 4 + 8 * 16 * 8 + 8 * 32 * 16)


def test_an_unknown_decoder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--decoder", "taehv", "--out", str(tmp_path / "a.json")]) == 2
    assert "unknown decoder 'taehv'; expected NAME=FILE or one of" in capsys.readouterr().err
    assert not (tmp_path / "a.json").exists()
