"""Files that are no checkpoints, or no longer, and what identifies the good ones."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightforcing_ref.checkpoint import checkpoint_sha256, load_dit_state
from lightforcing_ref.errors import CheckpointError
from tests.lightforcing_ref.checkpoint.test_load import (
    DIT,
    State,
    dit_state,
    legacy_torch,
    self_forcing,
    wan_file,
    wan_shards,
    write_kind,
)

# ---- files that are no checkpoints, or no longer ----


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (b"just some text", "neither a safetensors nor a torch file"),
        (b"PK\x03\x04 and then nothing of a zip file", "truncated or damaged"),
        (b"\x80\x02}q\x00", "truncated or damaged"),
    ],
)
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_files_that_are_no_checkpoints(content: bytes, message: str, name: str, tmp_path: Path) -> None:
    path = write_bytes(tmp_path / name, content)
    in_doubt = "truncated or damaged" if name.endswith("safetensors") else message
    with pytest.raises(CheckpointError, match=f"{message}|{in_doubt}"):
        load_dit_state(path, DIT)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_dit_state(tmp_path / "missing.pt", DIT)
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors or \.bin checkpoint"):
        load_dit_state(tmp_path, DIT)


def test_an_ambiguous_folder(tmp_path: Path) -> None:
    write_kind("dit", tmp_path)
    write_kind("vae", tmp_path)
    with pytest.raises(CheckpointError, match=r"several checkpoints \(dit.safetensors, vae.safetensors\)"):
        load_dit_state(tmp_path, DIT)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kept=st.floats(0, 1, exclude_max=True), write=st.sampled_from([self_forcing, legacy_torch, wan_file]))
def test_every_truncated_file_is_refused(
    kept: float, write: Callable[[Path, State], Path], tmp_path: Path
) -> None:
    whole = write(tmp_path, dit_state()).read_bytes()
    path = write_bytes(tmp_path / "cut.bin", whole[: int(kept * len(whole))])
    with pytest.raises(CheckpointError, match=r"truncated or damaged|is empty|neither a safetensors nor"):
        load_dit_state(path, DIT)


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    index = wan_shards(tmp_path, dit_state())
    shard = tmp_path / "diffusion_pytorch_model-00002-of-00003.safetensors"
    write_bytes(shard, shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"00002-of-00003.safetensors \(\d+ bytes\) is truncated"):
        load_dit_state(index, DIT)


class Payload:
    """Would create a file if it were ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_does_not_run(zipped: bool, tmp_path: Path) -> None:
    content = {"generator": dit_state(), "config": Payload(tmp_path / "ran")}
    torch.save(content, tmp_path / "bad.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError, match=r"more than tensors and plain data .*convert it to safetensors"
    ):
        load_dit_state(tmp_path / "bad.pt", DIT)
    assert not (tmp_path / "ran").exists()


class Command:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("true",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_named_and_not_called_damage(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "bad.pt"
    torch.save({"generator": Command()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=rf"more than tensors .*it calls for {os.name}\.system\)"):
        load_dit_state(path, DIT)
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    with pytest.raises(CheckpointError, match="a TorchScript program"):
        load_dit_state(path, DIT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"optimizer": {"lr": 1.0}, "step": 3}, r"holds optimizer \(dict\), step \(int\); expected"),
        ([torch.zeros(1)], "holds a list; expected tensors by name"),
        (
            {"model.head.modulation": torch.zeros(1), "head.modulation": torch.zeros(1)},
            "holds 'head.modulation' twice",
        ),
    ],
)
def test_torch_files_with_other_content(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=message):
        load_dit_state(tmp_path / "model.pt", DIT)


def test_shards_outside_the_folder_are_refused(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    wan_file(tmp_path, dit_state())
    for name in (
        "../diffusion_pytorch_model.safetensors",
        str(tmp_path / "diffusion_pytorch_model.safetensors"),
    ):
        index = inside / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"head.modulation": name}}))
        with pytest.raises(CheckpointError, match="expected plain file names beside the index"):
            load_dit_state(index, DIT)


def test_an_index_that_does_not_fit_its_shards(tmp_path: Path) -> None:
    index = wan_shards(tmp_path, dit_state())
    content = json.loads(index.read_text())
    first = content["weight_map"]["head.modulation"]
    moved = next(name for name in content["weight_map"].values() if name != first)
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {"head.modulation": moved}}))
    with pytest.raises(CheckpointError, match=f"lists 'head.modulation' in {moved}, which lacks it"):
        load_dit_state(index, DIT)
    (tmp_path / first).unlink()
    with pytest.raises(CheckpointError, match=f"names the shard '{first}', which is not beside it"):
        load_dit_state(index, DIT)


@pytest.mark.parametrize(
    "text", ["not json", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {}, "x": 1}', "\xff"]
)
def test_a_damaged_index(text: str, tmp_path: Path) -> None:
    index = write_bytes(tmp_path / "model.safetensors.index.json", text.encode("latin-1"))
    with pytest.raises(CheckpointError, match="is no index of a sharded checkpoint"):
        load_dit_state(index, DIT)


# ---- identity ----


def test_sha256_of_a_file_is_the_usual_one(tmp_path: Path) -> None:
    path = write_kind("vae", tmp_path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert checkpoint_sha256(path) == digest
    assert checkpoint_sha256(tmp_path) == digest


def test_sha256_of_shards_covers_every_file(tmp_path: Path) -> None:
    index = wan_shards(tmp_path, dit_state())
    files = [index, *sorted(tmp_path.glob("*.safetensors"))]
    listing = "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files)
    whole = checkpoint_sha256(index)
    assert whole == hashlib.sha256(listing.encode()).hexdigest()
    last = files[-1]
    write_bytes(last, last.read_bytes()[:-1] + b"\x01")
    assert checkpoint_sha256(index) != whole
