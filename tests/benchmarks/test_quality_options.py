from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.quality import main as quality


def test_a_wrong_bundle_is_told_before_the_first_clip(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "results"
    common = ["--rows", "dense", "--finetuned-rows", "", "--prompts", "1", "--out", str(out)]
    assert quality.main([*common, "--bundle", f"mine={tmp_path / 'no'}"]) == 2
    assert "no bundle at" in capsys.readouterr().err
    assert quality.main([*common, "--bundle", "mine"]) == 2
    assert "expected NAME=PATH" in capsys.readouterr().err
    assert not out.exists()


def test_frames_are_compared_with_a_row_that_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rows", "dense", "--finetuned-rows", "", "--against"]
    assert quality.main([*options, "finetuned-hsa"]) == 2
    assert "expected one of the rows: dense" in capsys.readouterr().err
