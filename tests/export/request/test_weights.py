"""Files that hold something else are refused before a build begins."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from export.cli.main import main
from export.compare.reference import Reference
from export.errors import ComparisonError
from export.request.weights import Weights, shipped_weights
from lightforcing_ref.checkpoint.spec import lora_targets
from lightforcing_ref.config import PRESETS
from lightforcing_ref.shipped import shipped
from runtime.bundle import Checkpoint, load_bundle

FILES = shipped("tiny") or pytest.fail("the tiny model's weights are part of the package")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
    weights.check(with_encoder=True)
    Weights(PRESETS["tiny"], seed=0).check()


def test_shipped_weights_are_those_for_the_attention_and_the_chunks() -> None:
    def chosen(**how: Any) -> Path | None:
        weights = shipped_weights(PRESETS["tiny"], **how)
        return weights.checkpoint if weights else None

    assert chosen(dense=True) == FILES.dense_transformer
    assert chosen(dense=True, chunk_frames=1) == FILES.framewise_transformer
    assert chosen(dense=False) == chosen(dense=False, chunk_frames=1) == FILES.transformer


def test_a_bundle_says_which_lora_was_merged_into_its_checkpoint(tmp_path: Path) -> None:
    config = PRESETS["tiny"].dit
    generator = torch.Generator().manual_seed(0)
    lora = {}
    for target, (out_dim, in_dim) in lora_targets(config).items():
        stem = target.removesuffix(".weight")
        lora[f"{stem}.lora_A.weight"] = torch.randn(2, in_dim, generator=generator)
        lora[f"{stem}.lora_B.weight"] = torch.randn(out_dim, 2, generator=generator) / 100
    save_file(lora, tmp_path / "style.safetensors")
    files = {
        "checkpoint": FILES.transformer,
        "lora": f"{tmp_path / 'style.safetensors'}:0.5",
        "vae": FILES.vae,
        "text-encoder": FILES.text_encoder,
        "tokenizer": FILES.tokenizer,
    }
    options = [part for name, file in files.items() for part in (f"--{name}", str(file))]
    options += ["--lora", str(tmp_path / "style.safetensors")]
    command = [
        "build",
        "--preset",
        "tiny",
        "--resolution",
        "32x32",
        "--name",
        "styled",
        "--out",
        str(tmp_path),
    ]
    assert main([*command, *options]) == 0
    manifest = load_bundle(tmp_path / "styled").manifest
    origin = manifest.provenance.checkpoint
    assert isinstance(origin, Checkpoint) and origin.lora is not None
    merged = [(lora.source, lora.sha256, lora.strength) for lora in origin.loras]
    name, sha256 = "style.safetensors", digest(tmp_path / "style.safetensors")
    assert merged == [(name, sha256, 0.5), (name, sha256, 1.0)]
    assert f"{name} (SHA-256 {sha256[:12]}...) at 0.5 with {name}" in origin.described
    assert {role: file.source for role, file in manifest.provenance.files.items()} == dict.fromkeys(
        ("vae", "text_encoder", "tokenizer"), "shipped:tiny"
    )
    assert manifest.provenance.files["vae"].sha256 == digest(FILES.vae)
    assert str(tmp_path) not in (tmp_path / "styled" / "manifest.json").read_text()
    assert (origin.source, origin.sha256) == ("shipped:tiny", digest(FILES.transformer))
    with pytest.raises(ComparisonError, match=r"pass the files .* --lora"):
        Reference.of(manifest)
