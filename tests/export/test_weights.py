"""Files that hold something else are refused before a build begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.cli import main
from export.weights import Weights, shipped_weights
from lightforcing_ref.config import PRESETS
from lightforcing_ref.shipped import shipped

FILES = shipped("tiny") or pytest.fail("the tiny model's weights are part of the package")


@pytest.mark.parametrize(
    ("role", "path"),
    [
        ("checkpoint", FILES.vae),
        ("checkpoint", FILES.text_encoder),
        ("lora", FILES.transformer),
        ("vae", FILES.transformer),
        ("text-encoder", FILES.vae),
        ("tokenizer", FILES.vae),
    ],
)
def test_a_build_with_a_file_for_something_else_writes_nothing(
    role: str, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "checkpoint": FILES.transformer,
        "vae": FILES.vae,
        "text-encoder": FILES.text_encoder,
        "tokenizer": FILES.tokenizer,
    } | {role: path}
    options = [part for name, file in files.items() for part in (f"--{name}", str(file))]
    assert main(["build", "--preset", "tiny", "--out", str(tmp_path / "out"), *options]) == 2
    assert path.name in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_shipped_and_what_is_random_pass() -> None:
    weights = shipped_weights(PRESETS["tiny"], dense=True)
    assert weights is not None
    weights.check()
    Weights(PRESETS["tiny"], seed=0).check()
