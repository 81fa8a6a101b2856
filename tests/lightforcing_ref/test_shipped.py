"""Where the weights that come with the package are found."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from lightforcing_ref import shipped as module
from lightforcing_ref.checkpoint import load_dit_state, load_umt5_state, load_vae_state
from lightforcing_ref.config import PRESETS
from lightforcing_ref.shipped import CAPTIONS, Shipped, shipped
from training.data.clips import all_clips


def test_the_tiny_preset_comes_with_all_its_weights() -> None:
    files = shipped("tiny")
    assert files is not None
    preset = PRESETS["tiny"]
    for transformer in (files.transformer, files.dense_transformer, files.framewise_transformer):
        load_dit_state(transformer, preset.dit)
    load_vae_state(files.vae, preset.vae)
    load_umt5_state(files.text_encoder, preset.text)


def test_the_example_captions_are_of_the_form_that_the_weights_were_trained_on() -> None:
    assert CAPTIONS["tiny"] in {clip.caption for clip in all_clips()}
    assert all(shipped(preset) is not None for preset in CAPTIONS)


def test_a_preset_without_files_has_none() -> None:
    assert shipped("wan-1.3b") is None
    assert shipped("unheard-of") is None


def test_an_incomplete_folder_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ASSETS", tmp_path)
    names = (
        "dit.safetensors",
        "dit_dense.safetensors",
        "dit_framewise.safetensors",
        "vae.safetensors",
        "text_encoder.safetensors",
        "tokenizer.json",
    )
    (tmp_path / "small").mkdir()
    for name in names:
        assert shipped("small") is None
        (tmp_path / "small" / name).write_bytes(b"")
    files = shipped("small")
    assert files is not None
    assert {getattr(files, field.name).name for field in fields(Shipped)} == set(names)
