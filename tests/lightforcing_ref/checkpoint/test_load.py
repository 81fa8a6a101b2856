"""Loading every public checkpoint format, from small real files, and refusing everything else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightforcing_ref.checkpoint import (
    CheckpointKind,
    checkpoint_kind,
    load_dit_state,
    load_lora,
    load_umt5_state,
    load_vae_state,
    vae_config_of,
)
from lightforcing_ref.checkpoint.lora import MergedLoRA
from lightforcing_ref.checkpoint.spec import lora_targets
from lightforcing_ref.config import PRESETS, DiTConfig
from lightforcing_ref.decoders.vae import VAEDecoder
from lightforcing_ref.dimensions import VAEConfig
from lightforcing_ref.errors import CheckpointError
from lightforcing_ref.model import CausalWanModel
from lightforcing_ref.shipped import shipped
from lightforcing_ref.text import UMT5_TINY
from tests.lightforcing_ref.checkpoint import fixtures

DIT = DiTConfig(dim=16, ffn_dim=24, heads=2, layers=2, text_dim=12, text_len=4)
VAE = VAEConfig(dim=2)

State = dict[str, Tensor]


def dit_state(seed: int = 0, dtype: torch.dtype = torch.float32) -> State:
    return fixtures.tensors(fixtures.dit(fixtures.DIT_SMALL), seed, dtype)


def assert_same(loaded: State, expected: State) -> None:
    assert set(loaded) == set(expected)
    for key, value in expected.items():
        assert loaded[key].dtype == value.dtype, key
        assert torch.equal(loaded[key], value), key


# ---- the transformer ----


def self_forcing(folder: Path, state: State) -> Path:
    torch.save({"generator_ema": fixtures.prefixed(state, "model.")}, folder / "self_forcing_dmd.pt")
    return folder / "self_forcing_dmd.pt"


def longlive(folder: Path, state: State) -> Path:
    torch.save({"generator": fixtures.prefixed(state, "model.")}, folder / "longlive_base.pt")
    return folder / "longlive_base.pt"


def light_forcing(folder: Path, state: State) -> Path:
    other = {key: value + 1 for key, value in state.items()}
    content = {
        "generator": fixtures.prefixed(other, "model."),
        "critic": fixtures.prefixed(other, "model."),
        "step": 1000,
        "generator_ema": fixtures.prefixed(state, "model._fsdp_wrapped_module."),
    }
    torch.save(content, folder / "short_video_gen.pt")
    return folder / "short_video_gen.pt"


def light_forcing_without_ema(folder: Path, state: State) -> Path:
    wrapped = {
        f"model.{key.replace('blocks.1.', 'blocks.1._fsdp_wrapped_module.')}": value
        for key, value in state.items()
    }
    torch.save({"generator_ema": None, "generator": wrapped}, folder / "long_video_gen.pt")
    return folder / "long_video_gen.pt"


def legacy_torch(folder: Path, state: State) -> Path:
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)
    return folder / "old.pth"


def wan_file(folder: Path, state: State) -> Path:
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    return folder / "diffusion_pytorch_model.safetensors"


def wan_folder(folder: Path, state: State) -> Path:
    return wan_file(folder, state).parent


def wan_shards(folder: Path, state: State) -> Path:
    return fixtures.write_shards(folder, state)


def wan_shards_folder(folder: Path, state: State) -> Path:
    return fixtures.write_shards(folder, state).parent


WRITERS: list[Callable[[Path, State], Path]] = [
    self_forcing,
    longlive,
    light_forcing,
    light_forcing_without_ema,
    legacy_torch,
    wan_file,
    wan_folder,
    wan_shards,
    wan_shards_folder,
]


@pytest.mark.parametrize("write", WRITERS)
def test_dit_loads_from_every_release(write: Callable[[Path, State], Path], tmp_path: Path) -> None:
    state = dit_state(dtype=torch.bfloat16)
    path = write(tmp_path, state)
    loaded = load_dit_state(path, DIT)
    assert_same(loaded, state)
    assert checkpoint_kind(path) is CheckpointKind.DIT
    with torch.device("meta"):
        model = CausalWanModel(DIT)
    model.load_state_dict(loaded, strict=True, assign=True)
    assert torch.equal(model.get_parameter("blocks.1.ffn.2.weight"), state["blocks.1.ffn.2.weight"])


def test_dtype_converts_every_tensor(tmp_path: Path) -> None:
    state = dit_state(dtype=torch.bfloat16)
    loaded = load_dit_state(wan_file(tmp_path, state), DIT, dtype=torch.float32)
    assert_same(loaded, {key: value.float() for key, value in state.items()})


@pytest.mark.parametrize("section", [None, "generator_lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_adds_b_a_to_each_of_its_matrices(
    section: str | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = dit_state(dtype=dtype)
    lora = fixtures.tensors(fixtures.lora(fixtures.DIT_SMALL, rank=3), seed=1)
    torch.save({section: lora} if section else lora, tmp_path / "lora.pt")
    merged = load_dit_state(longlive(tmp_path, base), DIT, loras=[MergedLoRA(tmp_path / "lora.pt")])

    changed = set()
    for key, b in lora.items():
        if key.endswith(".lora_B.weight"):
            stem = key.removesuffix(".lora_B.weight")
            a = lora[f"{stem}.lora_A.weight"]
            target = stem.removeprefix("base_model.model.") + ".weight"
            delta = b.numpy().astype(np.float64) @ a.numpy().astype(np.float64)
            expected = torch.from_numpy(base[target].double().numpy() + delta)
            torch.testing.assert_close(
                merged[target].double(), expected.to(dtype).double(), rtol=1e-2, atol=1e-5
            )
            if dtype == torch.float32:
                torch.testing.assert_close(merged[target].double(), expected, rtol=1e-5, atol=1e-5)
            assert merged[target].dtype == dtype
            changed.add(target)
    assert len(changed) == 2 * 10
    assert_same(
        {key: value for key, value in merged.items() if key not in changed},
        {key: value for key, value in base.items() if key not in changed},
    )


def test_lora_sum_is_rounded_once(tmp_path: Path) -> None:
    """1 + 2^-8 is lost in bfloat16, so a sum that starts from a rounded weight cannot come out right."""
    key = "blocks.0.ffn.0.weight"
    base = dit_state()
    base[key] = torch.full_like(base[key], 1 + 2**-8)
    lora = {name: torch.zeros(shape) for name, shape in fixtures.lora(fixtures.DIT_SMALL, rank=1).items()}
    lora["base_model.model.blocks.0.ffn.0.lora_A.weight"] += 1
    lora["base_model.model.blocks.0.ffn.0.lora_B.weight"] += 2**-8
    torch.save(lora, tmp_path / "lora.pt")
    merged = load_dit_state(
        wan_file(tmp_path, base), DIT, loras=[MergedLoRA(tmp_path / "lora.pt")], dtype=torch.bfloat16
    )
    assert torch.equal(merged[key], torch.full_like(merged[key], 1 + 2**-7))


# ---- decoder and text encoder ----


@pytest.mark.parametrize("name", ["Wan2.1_VAE.pth", "lightvaew2_1.safetensors"])
def test_vae_loads_and_leaves_the_encoder_out(name: str, tmp_path: Path) -> None:
    decoder = fixtures.tensors(fixtures.vae(fixtures.VAE_SMALL))
    whole = decoder | fixtures.tensors(fixtures.expand(fixtures.VAE_ENCODER, fixtures.VAE_SMALL), seed=1)
    path = tmp_path / name
    save_file(whole, path) if path.suffix == ".safetensors" else torch.save(whole, path)
    loaded = load_vae_state(path, VAE)
    assert_same(loaded, decoder)
    assert vae_config_of(path) == VAE
    assert checkpoint_kind(path) is CheckpointKind.VAE
    with torch.device("meta"):
        model = VAEDecoder(VAE)
    model.load_state_dict(loaded, strict=True, assign=True)
    assert model.decode(torch.zeros(1, 16, 2, 2)).shape == (1, 3, 16, 16)


def test_vae_without_encoder_loads(tmp_path: Path) -> None:
    decoder = fixtures.tensors(fixtures.vae(fixtures.VAE_SMALL))
    torch.save(decoder, tmp_path / "vae.pth")
    assert_same(load_vae_state(tmp_path / "vae.pth", VAE), decoder)


def test_vae_config_tells_the_widths_apart(tmp_path: Path) -> None:
    state = fixtures.tensors(fixtures.vae({"top": 16, "half": 8, "quarter": 4}))
    save_file(state, tmp_path / "vae.safetensors")
    assert vae_config_of(tmp_path / "vae.safetensors") == VAEConfig(dim=4)
    with pytest.raises(
        CheckpointError, match=r"width 2: .*decoder\.conv1\.weight is \[16, 16, 3, 3, 3\], expected \[8, "
    ):
        load_vae_state(tmp_path / "vae.safetensors", VAE)


def umt5_states() -> tuple[State, State, State]:
    """The same weights under Wan's names, Hugging Face's, and the canonical ones."""
    wan = fixtures.tensors(fixtures.umt5_wan(fixtures.UMT5_SMALL_SIZES))
    hf = dict(zip(fixtures.umt5_hf(fixtures.UMT5_SMALL_SIZES), wan.values(), strict=True))
    parts = ("norm1", "q", "k", "v", "o", "rel_bias", "norm2", "gate", "fc1", "fc2")
    names = ["token_embedding", "norm", *(f"layers.{i}.{part}" for i in range(2) for part in parts)]
    return wan, hf, dict(zip(names, wan.values(), strict=True))


def test_umt5_loads_from_wans_layout(tmp_path: Path) -> None:
    wan, _, ours = umt5_states()
    path = tmp_path / "models_t5_umt5-xxl-enc-bf16.pth"
    torch.save(wan, path)
    assert_same(load_umt5_state(path, UMT5_TINY), ours)
    assert checkpoint_kind(path) is CheckpointKind.UMT5
    half = load_umt5_state(path, UMT5_TINY, dtype=torch.float16)
    assert_same(half, {key: value.half() for key, value in ours.items()})


@pytest.mark.parametrize("tied", ["shared", "embed_tokens", "both"])
def test_umt5_loads_from_hugging_faces_layout(tied: str, tmp_path: Path) -> None:
    _, hf, ours = umt5_states()
    if tied != "shared":
        hf["encoder.embed_tokens.weight"] = hf["shared.weight"].clone()
    if tied == "embed_tokens":
        del hf["shared.weight"]
    save_file(hf, tmp_path / "model.safetensors")
    assert_same(load_umt5_state(tmp_path, UMT5_TINY), ours)


def test_umt5_leaves_the_decoder_of_a_full_release_out(tmp_path: Path) -> None:
    _, hf, ours = umt5_states()
    hf["decoder.block.0.layer.0.SelfAttention.q.weight"] = torch.zeros(64, 64)
    hf["lm_head.weight"] = torch.zeros(259, 64)
    index = fixtures.write_shards(tmp_path, hf, suffix="bin")
    assert_same(load_umt5_state(index, UMT5_TINY), ours)
    assert_same(load_umt5_state(tmp_path, UMT5_TINY), ours)


# ---- the wrong checkpoint ----


def write_kind(kind: str, folder: Path) -> Path:
    states: dict[str, State] = {
        "dit": dit_state(),
        "vae": fixtures.tensors(fixtures.vae_file(fixtures.VAE_SMALL)),
        "umt5": umt5_states()[0],
        "lora": fixtures.tensors(fixtures.lora(fixtures.DIT_SMALL, 2)),
        "other": {"resnet.conv1.weight": torch.zeros(2)},
    }
    save_file(states[kind], folder / f"{kind}.safetensors")
    return folder / f"{kind}.safetensors"


LOADERS: dict[str, Callable[[Path], object]] = {
    "dit": lambda path: load_dit_state(path, DIT),
    "vae": lambda path: load_vae_state(path, VAE),
    "umt5": lambda path: load_umt5_state(path, UMT5_TINY),
    "lora": lambda path: load_lora(path, DIT),
}
ADVICE = {
    "dit": "a Wan diffusion transformer; pass it as --checkpoint",
    "vae": "a Wan VAE; pass it as --vae",
    "umt5": "a UMT5 text encoder; pass it as --text-encoder",
    "lora": "a LoRA; pass it as --lora",
    "other": "nothing that is known here",
}


@pytest.mark.parametrize("given", ADVICE)
@pytest.mark.parametrize("wanted", LOADERS)
def test_a_file_of_another_kind_is_recognised(given: str, wanted: str, tmp_path: Path) -> None:
    path = write_kind(given, tmp_path)
    if given == wanted:
        LOADERS[wanted](path)
        return
    with pytest.raises(CheckpointError) as caught:
        LOADERS[wanted](path)
    message = str(caught.value)
    assert str(path) in message
    assert ADVICE[given] in message
    assert "missing (" in message
    assert "unexpected (" in message


def test_vae_config_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="pass it as --text-encoder"):
        vae_config_of(write_kind("umt5", tmp_path))


def test_differences_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    state = dit_state()
    for layer in range(2):
        for part in "qkv":
            del state[f"blocks.{layer}.self_attn.{part}.bias"]
    state["blocks.0.cross_attn.k_img.weight"] = torch.zeros(16, 16)
    state["head.head.weight"] = torch.zeros(64, 32)
    with pytest.raises(CheckpointError) as caught:
        load_dit_state(wan_file(tmp_path, state), DIT)
    message = str(caught.value)
    assert "6 missing (blocks.0.self_attn.q.bias, blocks.0.self_attn.k.bias, " in message
    assert "blocks.1.self_attn.v.bias" not in message
    assert "1 unexpected (blocks.0.cross_attn.k_img.weight)" in message
    assert "1 of another shape (head.head.weight is [64, 32], expected [64, 16])" in message
    assert "a Wan diffusion transformer of another size or release" in message


def test_a_transformer_of_another_size(tmp_path: Path) -> None:
    larger = fixtures.tensors(fixtures.dit(fixtures.DIT_SMALL | {"dim": 32, "layers": 3}))
    with pytest.raises(
        CheckpointError, match=r"dim 16 with 2 layers: 27 unexpected .* of another shape \(.*another size"
    ):
        load_dit_state(wan_file(tmp_path, larger), DIT)


def test_quantised_tensors_are_refused(tmp_path: Path) -> None:
    state = dit_state()
    state["blocks.0.ffn.0.weight"] = state["blocks.0.ffn.0.weight"].to(torch.float8_e4m3fn)
    state["blocks.1.ffn.0.weight"] = state["blocks.1.ffn.0.weight"].to(torch.int8)
    with pytest.raises(
        CheckpointError,
        match=r"blocks\.0\.ffn\.0\.weight is float8_e4m3fn, blocks\.1\.ffn\.0\.weight is int8",
    ):
        load_dit_state(wan_file(tmp_path, state), DIT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lora: lora.popitem(), r"layers: 1 missing \(blocks\.1\.ffn\.2\.lora_B\.weight\)\. "),
        (
            lambda lora: lora.pop("base_model.model.blocks.0.ffn.0.lora_A.weight"),
            r"layers: 1 missing \(blocks\.0\.ffn\.0\.lora_A\.weight\)\. ",
        ),
        (
            lambda lora: lora.update(
                {"base_model.model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(5, 16)}
            ),
            "q.lora_B",
        ),
        (
            lambda lora: lora.update(
                {"base_model.model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(3, 17)}
            ),
            "q.lora_A",
        ),
        (
            lambda lora: lora.update(
                {"base_model.model.blocks.2.self_attn.q.lora_A.weight": torch.zeros(3, 16)}
            ),
            "unexpected",
        ),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(
    change: Callable[[State], object], message: str, tmp_path: Path
) -> None:
    lora = fixtures.tensors(fixtures.lora(fixtures.DIT_SMALL, rank=3))
    change(lora)
    torch.save({"generator_lora": lora}, tmp_path / "lora.pt")
    with pytest.raises(CheckpointError, match=message):
        load_dit_state(wan_file(tmp_path, dit_state()), DIT, loras=[MergedLoRA(tmp_path / "lora.pt")])


@pytest.mark.parametrize("kind", ["transformer", "text encoder", "LoRA"])
def test_a_file_of_another_preset_is_answered_with_its_name(kind: str, tmp_path: Path) -> None:
    files, wan = shipped("tiny"), PRESETS["wan-1.3b"]
    assert files is not None
    with pytest.raises(CheckpointError, match=r"it is that of the preset tiny; use --preset tiny"):
        if kind == "transformer":
            load_dit_state(files.transformer, wan.dit)
        elif kind == "text encoder":
            load_umt5_state(files.text_encoder, wan.text)
        else:
            tensors = {}
            for key, (out, inner) in lora_targets(PRESETS["tiny"].dit).items():
                stem = key.removesuffix(".weight")
                tensors[f"{stem}.lora_A.weight"] = torch.ones(4, inner)
                tensors[f"{stem}.lora_B.weight"] = torch.ones(out, 4)
            save_file(tensors, tmp_path / "lora.safetensors")
            load_lora(tmp_path / "lora.safetensors", wan.dit)


def test_loras_are_merged_in_order_at_their_strengths(tmp_path: Path) -> None:
    base = dit_state()
    loras = [fixtures.tensors(fixtures.lora(fixtures.DIT_SMALL, rank=rank), seed=rank) for rank in (2, 3)]
    paths = [tmp_path / f"lora{index}.pt" for index in range(2)]
    for path, lora in zip(paths, loras, strict=True):
        torch.save(lora, path)
    strengths = (0.75, -0.5)
    merged = load_dit_state(
        wan_file(tmp_path, base),
        DIT,
        loras=[MergedLoRA(path, strength) for path, strength in zip(paths, strengths, strict=True)],
    )
    for key in ("blocks.0.self_attn.q.weight", "blocks.1.ffn.2.weight"):
        stem = f"base_model.model.{key.removesuffix('.weight')}"
        expected = base[key].double()
        for lora, strength in zip(loras, strengths, strict=True):
            a, b = (lora[f"{stem}.lora_{part}.weight"].double() for part in "AB")
            expected = expected + strength * (b @ a)
        torch.testing.assert_close(merged[key], expected.to(base[key].dtype), rtol=1e-5, atol=1e-6)
    assert torch.equal(merged["head.head.weight"], base["head.head.weight"])
