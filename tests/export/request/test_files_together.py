"""Files that do not belong together: the one to blame is named, and no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor

from export.cli import command
from export.quantize.decision import weights_identity
from export.request.weights import Weights, shipped_weights
from lightforcing_ref.checkpoint import SECTIONS
from lightforcing_ref.checkpoint.lora import MergedLoRA
from lightforcing_ref.config import PRESETS
from lightforcing_ref.errors import CheckpointError

TINY = PRESETS["tiny"]


def shipped() -> Weights:
    found = shipped_weights(TINY, dense=True)
    assert found is not None
    return found


def widened(state: dict[str, Tensor], key: str, dim: int, size: int) -> dict[str, Tensor]:
    """The state with one tensor of another size along `dim`."""
    shape = list(state[key].shape)
    shape[dim] = size
    return state | {key: torch.full(shape, 0.5)}


@pytest.mark.parametrize(
    ("role", "key", "dim", "size", "what"),
    [
        # A transformer for the texts of another encoder.
        ("checkpoint", "text_embedding.0.weight", 1, 96, r"text_embedding\.0\.weight is \[\d+, 96\]"),
        # An encoder whose texts are wider than the transformer takes them.
        ("text_encoder", "norm", 0, 96, r"is \[96\], expected \[64\]"),
        # A decoder of latents with 48 channels, as Wan 2.2's are, and a transformer whose latents have them.
        ("vae", "decoder.conv1.weight", 1, 48, r"decoder\.conv1\.weight is \[\d+, 48, 3, 3, 3\]"),
        ("checkpoint", "patch_embedding.weight", 1, 48, r"patch_embedding\.weight is \[\d+, 48, 1, 2, 2\]"),
    ],
)
def test_the_file_that_does_not_belong_is_blamed(
    role: str, key: str, dim: int, size: int, what: str, tmp_path: Path
) -> None:
    weights = shipped()
    weights.check()
    state = load_file(getattr(weights, role))
    (name,) = [name for name in state if name == key or name.removesuffix(".weight").endswith(key)]
    save_file(widened(state, name, dim, size), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=what) as caught:
        replace(weights, **{role: tmp_path / "other.safetensors"}).check()
    message = str(caught.value)
    assert str(tmp_path / "other.safetensors") in message
    for other in {"checkpoint", "vae", "text_encoder"} - {role}:
        assert str(getattr(weights, other)) not in message


@pytest.mark.parametrize(
    "special",
    [
        ["<|startoftext|>", "<|endoftext|>", "<unk>"],  # fewer entries than the encoder has rows
        ["<pad>", "</s>", "<unk>", *map(str, range(1000))],  # more
    ],
)
def test_a_tokenizer_of_another_model_is_refused_before_the_build(special: list[str], tmp_path: Path) -> None:
    vocabulary = {word: number for number, word in enumerate(special)}
    other = tmp_path / "other.json"
    Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>")).save(str(other))
    with pytest.raises(CheckpointError, match=r"other\.json is not the text encoder's") as caught:
        replace(shipped(), tokenizer=other).check()
    assert str(shipped().text_encoder) not in str(caught.value)


def test_a_calibration_is_of_the_weights_with_their_loras_and_of_their_section(tmp_path: Path) -> None:
    weights = shipped()
    plain = weights_identity(weights)
    assert set(plain) == {"checkpoint"}
    target = "blocks.0.self_attn.q"
    dim = load_file(weights.checkpoint)[f"{target}.weight"].shape[0]
    pair = {f"{target}.lora_A.weight": torch.ones(2, dim), f"{target}.lora_B.weight": torch.ones(dim, 2)}
    save_file(pair, tmp_path / "lora.safetensors")
    changed = [
        replace(weights, loras=(MergedLoRA(tmp_path / "lora.safetensors", 1.0),)),
        replace(weights, loras=(MergedLoRA(tmp_path / "lora.safetensors", 0.5),)),
        replace(weights, section="generator"),
    ]
    found = [plain, *map(weights_identity, changed)]
    assert all(one != other for index, one in enumerate(found) for other in found[:index])


def test_the_command_line_offers_sections_that_exist_in_their_order() -> None:
    offered = command._SECTIONS
    assert tuple(name for name in SECTIONS if name in offered) == offered


def test_the_section_is_part_of_what_weights_are(tmp_path: Path) -> None:
    weights = shipped()
    state = load_file(weights.checkpoint)
    torch.save(
        {"generator": state, "model": {key: value + 1 for key, value in state.items()}}, tmp_path / "run.pt"
    )
    chosen = replace(weights, checkpoint=tmp_path / "run.pt", section="model")
    other = replace(chosen, section=None)
    assert chosen.digests() != other.digests()
    assert "(model)" in chosen.described
    key = "head.head.bias"
    assert torch.equal(chosen.dit(torch.float32).state_dict()[key], (state[key] + 1).float())
    assert torch.equal(other.dit(torch.float32).state_dict()[key], state[key].float())


def test_a_pipelines_folder_gives_each_model_its_own(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    for folder in ("transformer", "vae", "text_encoder", "tokenizer"):
        (tmp_path / folder).mkdir()
    weights = Weights(TINY, checkpoint=tmp_path, vae=tmp_path, text_encoder=tmp_path, tokenizer=tmp_path)
    found = (weights.checkpoint, weights.vae, weights.text_encoder, weights.tokenizer)
    assert [path and path.name for path in found] == ["transformer", "vae", "text_encoder", "tokenizer"]
