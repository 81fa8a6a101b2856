"""Files that hold the right tensors with wrong values, in wrappers' layouts, or at another strength than 1."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import Tensor

from lightforcing_ref.checkpoint import load as checkpoint
from lightforcing_ref.checkpoint import (
    load_dit_state,
    load_lora,
    load_umt5_state,
    load_vae_encoder_state,
    load_vae_state,
)
from lightforcing_ref.checkpoint.lora import MergedLoRA
from lightforcing_ref.checkpoint.spec import vae_encoder_shapes
from lightforcing_ref.checkpoint.values import check_values
from lightforcing_ref.errors import CheckpointError
from lightforcing_ref.text import UMT5_TINY, byte_tokenizer, check_tokenizer
from tests.lightforcing_ref.checkpoint import fixtures
from tests.lightforcing_ref.checkpoint.test_load import DIT, VAE, State, assert_same, dit_state

Load = Callable[[Path], object]
LOADERS: dict[str, tuple[Callable[[], State], str, Load]] = {
    "transformer": (dit_state, "blocks.1.ffn.2.weight", lambda path: load_dit_state(path, DIT)),
    "decoder": (
        lambda: fixtures.tensors(fixtures.vae(fixtures.VAE_SMALL)),
        "decoder.head.2.weight",
        lambda path: load_vae_state(path, VAE),
    ),
    "text encoder": (
        lambda: fixtures.tensors(fixtures.umt5_wan(fixtures.UMT5_SMALL_SIZES)),
        "token_embedding.weight",
        lambda path: load_umt5_state(path, UMT5_TINY),
    ),
    "lora": (
        lambda: fixtures.tensors(fixtures.lora(fixtures.DIT_SMALL, 2)),
        "base_model.model.blocks.0.self_attn.q.lora_B.weight",
        lambda path: load_lora(path, DIT),
    ),
}


def spoil(tensor: Tensor, value: float) -> None:
    tensor.view(-1)[tensor.numel() // 2] = value


def test_values_are_judged_once_and_again_when_the_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, key, load = LOADERS["decoder"]
    state, path = make(), tmp_path / "decoder.safetensors"
    looks: list[str] = []
    monkeypatch.setattr(
        checkpoint, "check_values", lambda found, source: looks.append(source) or check_values(found, source)
    )
    save_file(state, path)
    load(path)
    load(path)
    assert len(looks) == 1
    spoil(state[key], math.nan)
    path.unlink()  # tensors of the first are mapped from it
    save_file(state, path)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="1 NaN"):
            load(path)


@pytest.mark.parametrize("damaged", ["decoder", "encoder"])
def test_both_halves_of_a_file_are_judged_whichever_is_loaded_first(damaged: str, tmp_path: Path) -> None:
    noise = torch.Generator().manual_seed(0)
    encoder = {key: torch.randn(shape, generator=noise) for key, shape in vae_encoder_shapes(VAE).items()}
    state = {**fixtures.tensors(fixtures.vae(fixtures.VAE_SMALL)), **encoder}
    spoil(state[f"{damaged}.conv1.weight"], math.nan)
    path = tmp_path / "vae.safetensors"
    save_file(state, path)
    halves: dict[str, Load] = {
        "decoder": lambda path: load_vae_state(path, VAE),
        "encoder": lambda path: load_vae_encoder_state(path, VAE),
    }
    whole = "encoder" if damaged == "decoder" else "decoder"
    halves[whole](path)
    with pytest.raises(CheckpointError, match=rf"{damaged}\.conv1\.weight holds 1 NaN"):
        halves[damaged](path)


def test_a_section_is_judged_though_another_was(tmp_path: Path) -> None:
    good, bad = dit_state(), dit_state()
    spoil(bad["blocks.1.ffn.2.weight"], math.nan)
    torch.save({"generator": good, "model": bad}, tmp_path / "run.pt")
    load_dit_state(tmp_path / "run.pt", DIT)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.ffn\.2\.weight holds 1 NaN"):
        load_dit_state(tmp_path / "run.pt", DIT, section="model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("value", "words"), [(math.nan, "1 NaN"), (-math.inf, "infinite"), (1e38, r"reaches (1e\+38|9.97e\+37)")]
)
@pytest.mark.parametrize("model", LOADERS)
def test_one_wrong_number_is_found_and_its_tensor_named(
    model: str, value: float, words: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    make, key, load = LOADERS[model]
    state = {name: tensor.to(dtype) for name, tensor in make().items()}
    save_file(state, tmp_path / "good.safetensors")
    load(tmp_path / "good.safetensors")
    spoil(state[key], value)
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"bad\.safetensors .*{key.removeprefix('base_model.model.')} .*{words}"
    ):
        load(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("model", ["transformer", "decoder", "text encoder"])
def test_a_matrix_of_zeros_is_refused_and_a_bias_of_zeros_is_not(model: str, tmp_path: Path) -> None:
    make, key, load = LOADERS[model]
    state = make()
    for name in state:
        if name.endswith(".bias"):
            state[name].zero_()
    save_file(state, tmp_path / "biases.safetensors")
    load(tmp_path / "biases.safetensors")
    state[key].zero_()
    save_file(state, tmp_path / "zeros.safetensors")
    with pytest.raises(CheckpointError, match=f"{key} is zero throughout"):
        load(tmp_path / "zeros.safetensors")


def test_values_are_taken_as_they_are_on_request(tmp_path: Path) -> None:
    state = dit_state()
    spoil(state["head.head.weight"], math.nan)
    save_file(state, tmp_path / "bad.safetensors")
    assert (
        load_dit_state(tmp_path / "bad.safetensors", DIT, any_values=True)["head.head.weight"].isnan().sum()
        == 1
    )


def test_a_flipped_bit_in_a_torch_file_is_found(tmp_path: Path) -> None:
    state = dit_state()
    torch.save(state, tmp_path / "good.pt")
    data = bytearray((tmp_path / "good.pt").read_bytes())
    at = data.index(state["blocks.0.ffn.0.weight"].numpy().tobytes())
    for offset in (0, 3, 700):
        flipped = bytearray(data)
        flipped[at + offset] ^= 1
        (tmp_path / f"bad{offset}.pt").write_bytes(flipped)
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            load_dit_state(tmp_path / f"bad{offset}.pt", DIT)
    assert_same(load_dit_state(tmp_path / "good.pt", DIT), state)


def test_a_torch_file_without_checksums_loads(tmp_path: Path) -> None:
    state = dit_state()
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "plain.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert_same(load_dit_state(tmp_path / "plain.pt", DIT), state)


@pytest.mark.parametrize(
    "change",
    [
        lambda key: f"model._orig_mod.{key}",
        lambda key: f"model._fsdp_wrapped_module._orig_mod.{key}",
        lambda key: f"module.model.{key}",
        lambda key: f"model.diffusion_model.{key}",
        lambda key: key.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."),
    ],
)
@pytest.mark.parametrize("section", ["generator_ema", "model", None])
def test_wrappers_prefixes_are_taken_off(
    change: Callable[[str], str], section: str | None, tmp_path: Path
) -> None:
    state = dit_state()
    wrapped = {change(key): value for key, value in state.items()}
    torch.save({section: wrapped} if section else wrapped, tmp_path / "x.pt")
    assert_same(load_dit_state(tmp_path / "x.pt", DIT), state)


def test_comfyuis_text_encoder_loads(tmp_path: Path) -> None:
    wan = fixtures.tensors(fixtures.umt5_wan(fixtures.UMT5_SMALL_SIZES))
    hf = dict(zip(fixtures.umt5_hf(fixtures.UMT5_SMALL_SIZES), wan.values(), strict=True))
    save_file(hf | {"spiece_model": torch.zeros(1000, dtype=torch.uint8)}, tmp_path / "te.safetensors")
    loaded = load_umt5_state(tmp_path / "te.safetensors", UMT5_TINY)
    assert torch.equal(loaded["token_embedding"], wan["token_embedding.weight"])


@pytest.mark.parametrize(
    ("spoiled", "words"),
    [
        (lambda value: value.to_sparse(), "sparse_coo"),
        (lambda value: value.to("meta"), "meta device"),
    ],
)
def test_tensors_without_plain_values_are_refused(
    spoiled: Callable[[Tensor], Tensor], words: str, tmp_path: Path
) -> None:
    state = dit_state()
    state["head.head.weight"] = spoiled(state["head.head.weight"])
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=words):
        load_dit_state(tmp_path / "x.pt", DIT)


def test_parameters_and_views_load_as_plain_tensors(tmp_path: Path) -> None:
    state = dit_state()
    odd = {key: torch.nn.Parameter(value) for key, value in state.items()}
    odd["blocks.0.ffn.0.weight"] = torch.nn.Parameter(state["blocks.0.ffn.0.weight"].T.contiguous().T)
    torch.save(odd, tmp_path / "x.pt")
    loaded = load_dit_state(tmp_path / "x.pt", DIT)
    assert_same(loaded, state)
    assert not any(value.requires_grad for value in loaded.values())


# ---- the strength of a LoRA ----

RANK = 4


def peft_folder(folder: Path, lora: State, **settings: object) -> Path:
    folder.mkdir()
    save_file(lora, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **settings}))
    return folder


def kohya(folder: Path, lora: State, metadata: dict[str, str]) -> Path:
    folder.mkdir()
    save_file(lora, folder / "lora.safetensors", metadata=metadata)
    return folder / "lora.safetensors"


def training(folder: Path, lora: State, settings: dict[str, object]) -> Path:
    folder.mkdir()
    torch.save({"generator_lora": lora, "lora_config": settings}, folder / "lora.pt")
    return folder / "lora.pt"


def with_alphas(folder: Path, lora: State, alpha: float) -> Path:
    folder.mkdir()
    stems = {key.removesuffix(".lora_A.weight") for key in lora if key.endswith(".lora_A.weight")}
    save_file(lora | {f"{stem}.alpha": torch.tensor(alpha) for stem in stems}, folder / "lora.safetensors")
    return folder / "lora.safetensors"


STRENGTHS: list[tuple[Callable[[Path, State], Path], float]] = [
    (lambda folder, lora: peft_folder(folder, lora, r=RANK, lora_alpha=8), 2.0),
    (lambda folder, lora: peft_folder(folder, lora, r=RANK, lora_alpha=1), 0.25),
    (lambda folder, lora: peft_folder(folder, lora, r=RANK, lora_alpha=8, use_rslora=True), 4.0),
    (lambda folder, lora: kohya(folder, lora, {"ss_network_alpha": "2", "ss_network_dim": "4"}), 0.5),
    (lambda folder, lora: kohya(folder, lora, {"format": "pt"}), 1.0),
    (
        lambda folder, lora: kohya(
            folder,
            lora,
            {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 12})},
        ),
        3.0,
    ),
    (lambda folder, lora: training(folder, lora, {"r": RANK, "lora_alpha": 16}), 4.0),
    (lambda folder, lora: with_alphas(folder, lora, 6.0), 1.5),
]


@pytest.mark.parametrize("case", range(len(STRENGTHS)))
def test_alpha_and_rank_are_applied_wherever_they_are_stated(case: int, tmp_path: Path) -> None:
    write, scale = STRENGTHS[case]
    lora = fixtures.tensors(fixtures.lora(fixtures.DIT_SMALL, RANK), seed=2)
    base = dit_state()
    save_file(base, tmp_path / "base.safetensors")
    merged = load_dit_state(
        tmp_path / "base.safetensors", DIT, loras=[MergedLoRA(write(tmp_path / "lora", lora))]
    )
    for layer, part in ((0, "self_attn.q"), (1, "ffn.2")):
        target = f"blocks.{layer}.{part}"
        a = lora[f"base_model.model.{target}.lora_A.weight"].double()
        b = lora[f"base_model.model.{target}.lora_B.weight"].double()
        expected = base[f"{target}.weight"].double() + scale * (b @ a)
        torch.testing.assert_close(merged[f"{target}.weight"].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 8, "lora_alpha": 8}, "states rank 8, and the LoRA's matrices have rank 4"),
        ({"r": RANK, "lora_alpha": 8, "use_dora": True}, "use_dora = True"),
        ({"r": RANK, "lora_alpha": 8, "alpha_pattern": {"ffn.0": 2}}, "alpha_pattern"),
        ({"r": RANK, "lora_alpha": 8, "bias": "all"}, "bias = 'all'"),
        ({"r": RANK, "lora_alpha": "many"}, "lora_alpha = 'many'"),
        ({"r": RANK, "lora_alpha": math.nan}, "lora_alpha = nan"),
        ({"r": 0, "lora_alpha": 1}, "rank 0"),
    ],
)
def test_settings_that_cannot_be_followed_are_named(
    settings: dict[str, object], words: str, tmp_path: Path
) -> None:
    lora = fixtures.tensors(fixtures.lora(fixtures.DIT_SMALL, RANK))
    with pytest.raises(CheckpointError, match=words):
        load_lora(peft_folder(tmp_path / "lora", lora, **settings), DIT)


def test_deep_json_is_refused_in_a_line(tmp_path: Path) -> None:
    lora = fixtures.tensors(fixtures.lora(fixtures.DIT_SMALL, RANK))
    folder = peft_folder(tmp_path / "lora", lora)
    (folder / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is no readable JSON"):
        load_lora(folder, DIT)
    (tmp_path / "x.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="no index of a sharded checkpoint"):
        load_dit_state(tmp_path / "x.safetensors.index.json", DIT)


# ---- tokenizer against encoder ----


@pytest.mark.parametrize(
    "vocab",
    [
        {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": UMT5_TINY.vocab},
        {"<|startoftext|>": 0, "<|endoftext|>": 1, "<unk>": 2},
        {"</s>": 0, "<pad>": 1, "<unk>": 2},
    ],
)
def test_another_models_tokenizer_is_refused(vocab: dict[str, int], tmp_path: Path) -> None:
    byte_tokenizer().save(str(tmp_path / "good.json"))
    check_tokenizer(tmp_path / "good.json", UMT5_TINY)
    Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>")).save(str(tmp_path / "bad.json"))
    with pytest.raises(CheckpointError, match=r"bad\.json is not the text encoder's"):
        check_tokenizer(tmp_path / "bad.json", UMT5_TINY)
