"""Files in the layouts of other libraries: Diffusers' names, matrices in eight bits, sections of training checkpoints.

The names that Diffusers has for Wan's tensors are typed from its published models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightforcing_ref.checkpoint import (
    CheckpointKind,
    checkpoint_kind,
    in_pipeline,
    load_dit_state,
    load_lora,
    load_umt5_state,
    load_vae_encoder_state,
    load_vae_state,
    vae_config_of,
)
from lightforcing_ref.checkpoint.spec import vae_encoder_shapes
from lightforcing_ref.config import DiTConfig
from lightforcing_ref.dimensions import VAEConfig
from lightforcing_ref.errors import CheckpointError
from lightforcing_ref.text import UMT5_TINY, build_encoder, encode, umt5_keys
from tests.lightforcing_ref.checkpoint import fixtures

DIT = DiTConfig(dim=16, ffn_dim=24, heads=2, layers=2, text_dim=12, text_len=4)
VAE = VAEConfig(dim=2)

State = dict[str, Tensor]

TRANSFORMER = """
patch_embedding patch_embedding
text_embedding.0 condition_embedder.text_embedder.linear_1
text_embedding.2 condition_embedder.text_embedder.linear_2
time_embedding.0 condition_embedder.time_embedder.linear_1
time_embedding.2 condition_embedder.time_embedder.linear_2
time_projection.1 condition_embedder.time_proj
head.head proj_out
head.modulation scale_shift_table
"""
BLOCK = """
self_attn.q attn1.to_q
self_attn.k attn1.to_k
self_attn.v attn1.to_v
self_attn.o attn1.to_out.0
self_attn.norm_q attn1.norm_q
self_attn.norm_k attn1.norm_k
cross_attn.q attn2.to_q
cross_attn.k attn2.to_k
cross_attn.v attn2.to_v
cross_attn.o attn2.to_out.0
cross_attn.norm_q attn2.norm_q
cross_attn.norm_k attn2.norm_k
norm3 norm2
ffn.0 ffn.net.0.proj
ffn.2 ffn.net.2
modulation scale_shift_table
"""
AUTOENCODER = """
conv1 quant_conv
conv2 post_quant_conv
encoder.conv1 encoder.conv_in
encoder.head.0 encoder.norm_out
encoder.head.2 encoder.conv_out
encoder.middle.0 encoder.mid_block.resnets.0
encoder.middle.1 encoder.mid_block.attentions.0
encoder.middle.2 encoder.mid_block.resnets.1
encoder.downsamples encoder.down_blocks
decoder.conv1 decoder.conv_in
decoder.head.0 decoder.norm_out
decoder.head.2 decoder.conv_out
decoder.middle.0 decoder.mid_block.resnets.0
decoder.middle.1 decoder.mid_block.attentions.0
decoder.middle.2 decoder.mid_block.resnets.1
decoder.upsamples.0 decoder.up_blocks.0.resnets.0
decoder.upsamples.1 decoder.up_blocks.0.resnets.1
decoder.upsamples.2 decoder.up_blocks.0.resnets.2
decoder.upsamples.3 decoder.up_blocks.0.upsamplers.0
decoder.upsamples.4 decoder.up_blocks.1.resnets.0
decoder.upsamples.5 decoder.up_blocks.1.resnets.1
decoder.upsamples.6 decoder.up_blocks.1.resnets.2
decoder.upsamples.7 decoder.up_blocks.1.upsamplers.0
decoder.upsamples.8 decoder.up_blocks.2.resnets.0
decoder.upsamples.9 decoder.up_blocks.2.resnets.1
decoder.upsamples.10 decoder.up_blocks.2.resnets.2
decoder.upsamples.11 decoder.up_blocks.2.upsamplers.0
decoder.upsamples.12 decoder.up_blocks.3.resnets.0
decoder.upsamples.13 decoder.up_blocks.3.resnets.1
decoder.upsamples.14 decoder.up_blocks.3.resnets.2
"""
RESIDUAL = """
residual.0 norm1
residual.2 conv1
residual.3 norm2
residual.6 conv2
shortcut conv_shortcut
"""


def renamed(state: State, *tables: tuple[str, str]) -> State:
    """A state dict with the second name of a table's line in place of the first; of each table, the longest that
    begins a key (behind what its pattern takes off) is meant.
    """
    for pattern, table in tables:
        pairs = sorted((line.split() for line in table.split("\n") if line), key=lambda pair: -len(pair[0]))
        state = {_renamed(key, pattern, pairs): value for key, value in state.items()}
    return state


def _renamed(key: str, pattern: str, pairs: list[list[str]]) -> str:
    found = re.match(pattern, key)
    start = found.end() if found else len(key)
    for wan, other in pairs:
        if re.match(rf"{re.escape(wan)}(\.|$)", key[start:]):
            return key[:start] + other + key[start + len(wan) :]
    return key


def diffusers_dit(state: State) -> State:
    return renamed(state, (r"blocks\.\d+\.", BLOCK), (r"", TRANSFORMER))


def diffusers_vae(state: State) -> State:
    inner = r"(en|de)coder\.(middle|downsamples|upsamples)\.\d+\."
    return renamed(state, (inner, RESIDUAL), (r"", AUTOENCODER))


def vae_state() -> State:
    return fixtures.tensors(fixtures.vae(fixtures.VAE_SMALL) | vae_encoder_shapes(VAE))


def assert_same(loaded: State, expected: State) -> None:
    assert set(loaded) == set(expected)
    for key, value in expected.items():
        assert loaded[key].dtype == value.dtype and torch.equal(loaded[key], value), key


# ---- Diffusers ----


def test_the_tables_above_reach_every_tensor() -> None:
    state = fixtures.tensors(fixtures.dit(fixtures.DIT_SMALL))
    kept = {key for key in diffusers_dit(state) if key in state}
    assert kept == {"patch_embedding.weight", "patch_embedding.bias"}
    video = vae_state()
    kept = {key for key in diffusers_vae(video) if key in video}
    assert kept == set()
    assert len(diffusers_vae(video)) == len(video)


def test_a_transformer_of_diffusers_loads_from_its_shards(tmp_path: Path) -> None:
    state = fixtures.tensors(fixtures.dit(fixtures.DIT_SMALL), dtype=torch.bfloat16)
    fixtures.write_shards(tmp_path, diffusers_dit(state))
    (tmp_path / "config.json").write_text("{}")
    assert_same(load_dit_state(tmp_path, DIT), state)
    assert checkpoint_kind(tmp_path) is CheckpointKind.DIT


def test_a_lora_of_diffusers_loads(tmp_path: Path) -> None:
    bare = {
        key.removeprefix("base_model.model."): value
        for key, value in fixtures.tensors(fixtures.lora(fixtures.DIT_SMALL, 2)).items()
    }
    save_file(bare, tmp_path / "wan.safetensors")
    other = {f"transformer.{key}": value for key, value in diffusers_dit(bare).items()}
    assert not set(other) & set(bare)
    save_file(other, tmp_path / "diffusers.safetensors")
    wanted, found = (load_lora(tmp_path / f"{name}.safetensors", DIT) for name in ("wan", "diffusers"))
    assert wanted.keys() == found.keys()
    for key, pair in wanted.items():
        assert all(torch.equal(one, other) for one, other in zip(pair, found[key], strict=True)), key


def test_an_autoencoder_of_diffusers_loads(tmp_path: Path) -> None:
    state = vae_state()
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(diffusers_vae(state), path)
    assert vae_config_of(path) == VAE and checkpoint_kind(path) is CheckpointKind.VAE
    decoder, encoder = load_vae_state(path, VAE), load_vae_encoder_state(path, VAE)
    assert_same(decoder | encoder, state)
    assert not decoder.keys() & encoder.keys()


def test_the_folder_of_a_pipeline_stands_for_its_models(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    assert in_pipeline(tmp_path, "transformer") == tmp_path
    (tmp_path / "model_index.json").write_text("{}")
    assert in_pipeline(tmp_path, "transformer") == tmp_path / "transformer"
    assert in_pipeline(tmp_path, "vae") == tmp_path  # it has none, and the error is about the folder named
    assert in_pipeline(tmp_path / "transformer", "transformer") == tmp_path / "transformer"


def test_a_part_of_diffusers_that_is_missing_is_named_as_wan_names_it(tmp_path: Path) -> None:
    state = diffusers_dit(fixtures.tensors(fixtures.dit(fixtures.DIT_SMALL)))
    del state["blocks.1.attn2.to_out.0.bias"]
    save_file(state, tmp_path / "file.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing \(blocks\.1\.cross_attn\.o\.bias\)"):
        load_dit_state(tmp_path / "file.safetensors", DIT)


# ---- sections ----


def sections(folder: Path, *names: str) -> tuple[Path, dict[str, State]]:
    states = {
        name: fixtures.tensors(fixtures.dit(fixtures.DIT_SMALL), seed) for seed, name in enumerate(names)
    }
    torch.save(
        {name: fixtures.prefixed(state, "model.") for name, state in states.items()}, folder / "run.pt"
    )
    return folder / "run.pt", states


def test_sections_have_an_order_and_can_be_chosen(tmp_path: Path) -> None:
    path, states = sections(tmp_path, "model", "generator", "generator_ema")
    assert_same(load_dit_state(path, DIT), states["generator_ema"])
    for name, state in states.items():
        assert_same(load_dit_state(path, DIT, section=name), state)
    path, states = sections(tmp_path, "model", "generator")
    assert_same(load_dit_state(path, DIT), states["generator"])
    with pytest.raises(CheckpointError, match="no section 'generator_ema'; it has generator, model"):
        load_dit_state(path, DIT, section="generator_ema")
    path, states = sections(tmp_path, "model")
    assert_same(load_dit_state(path, DIT), states["model"])


def test_a_file_without_sections_has_none_to_choose(tmp_path: Path) -> None:
    save_file(fixtures.tensors(fixtures.dit(fixtures.DIT_SMALL)), tmp_path / "file.safetensors")
    with pytest.raises(CheckpointError, match="no section 'generator'; it has none"):
        load_dit_state(tmp_path / "file.safetensors", DIT, section="generator")


# ---- eight bits ----


def text_state(layout: str) -> State:
    shapes = fixtures.umt5_wan if layout == "wan" else fixtures.umt5_hf
    return {key: value * 0.1 for key, value in fixtures.tensors(shapes(fixtures.UMT5_SMALL_SIZES)).items()}


MATRIX = re.compile(r".*\.(q|k|v|o|fc1|fc2|gate\.0|wi_0|wi_1|wo)\.weight$")


def unscaled(state: State) -> tuple[State, State]:
    """As files called `umt5-xxl-enc-fp8_e4m3fn` are: matrices rounded, the rest in bfloat16. And what they mean."""
    stored, meant = dict[str, Tensor](), dict[str, Tensor]()
    for key, value in state.items():
        stored[key] = value.to(torch.float8_e4m3fn if MATRIX.match(key) else torch.bfloat16)
        meant[key] = stored[key].float()
    return stored, meant


def scaled(state: State, *, name: str, rows: bool, mark: bool, stated: bool) -> tuple[State, State]:
    """As ComfyUI's and others' scaled files are; what they mean by numpy's types."""
    stored, meant = dict[str, Tensor](), dict[str, Tensor]()
    for key, value in state.items():
        if not MATRIX.match(key):
            stored[key] = meant[key] = value.half()
            meant[key] = meant[key].float()
            continue
        stem = key.removesuffix(".weight")
        largest = value.abs().amax(dim=1) if rows else value.abs().amax()
        scale = largest / 448
        codes = (value / (scale[:, None] if rows else scale)).to(torch.float8_e4m3fn)
        stored[key], stored[f"{stem}.{name}"] = codes, scale[:, None] if rows else scale
        stored[f"{stem}.{'scale_input' if name == 'scale_weight' else 'input_scale'}"] = torch.ones(())
        if stated:
            text = json.dumps({"format": "float8_e4m3fn"}).encode()
            stored[f"{stem}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
        wide = codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        meant[key] = torch.from_numpy(wide * (scale[:, None] if rows else scale).numpy())
    if mark:
        stored["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
        stored["spiece_model"] = torch.zeros(10, dtype=torch.uint8)
    return stored, meant


FILES: dict[str, tuple[str, Callable[[State], tuple[State, State]]]] = {
    "unscaled": ("wan", unscaled),
    "comfyui": ("hf", lambda state: scaled(state, name="scale_weight", rows=False, mark=True, stated=False)),
    "stated": ("hf", lambda state: scaled(state, name="weight_scale", rows=False, mark=False, stated=True)),
    "rows": ("wan", lambda state: scaled(state, name="weight_scale", rows=True, mark=False, stated=False)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_text_encoder_in_eight_bits_is_what_its_numbers_mean(name: str, tmp_path: Path) -> None:
    layout, write = FILES[name]
    stored, meant = write(text_state(layout))
    assert sum(value.dtype == torch.float8_e4m3fn and value.numel() > 0 for value in stored.values()) == 14
    save_file({key: value.contiguous() for key, value in stored.items()}, tmp_path / "encoder.safetensors")
    loaded = load_umt5_state(tmp_path / "encoder.safetensors", UMT5_TINY)
    keys = {key.name: key.wan if layout == "wan" else key.hf for key in umt5_keys(UMT5_TINY.layers)}
    assert loaded.keys() == keys.keys()
    for ours, public in keys.items():
        assert loaded[ours].element_size() >= 2, ours
        assert torch.equal(loaded[ours].float(), meant[public]), ours
    encoder = build_encoder(UMT5_TINY, dict(loaded))
    exact = build_encoder(UMT5_TINY, {ours: meant[public] for ours, public in keys.items()})
    ids, mask = torch.arange(8), torch.ones(8)
    assert torch.equal(encode(encoder, ids, mask), encode(exact, ids, mask))


def comfyui() -> State:
    return scaled(text_state("hf"), name="scale_weight", rows=False, mark=True, stated=False)[0]


Q = "encoder.block.0.layer.0.SelfAttention.q"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop(f"{Q}.scale_weight"),
            r"stores .*\.q\.weight in eight bits without the scale",
        ),
        (
            lambda state: state[f"{Q}.scale_weight"].fill_(0),
            r"scale .*\.q\.scale_weight, which is not positive",
        ),
        (lambda state: state[f"{Q}.scale_weight"].fill_(float("nan")), "which is not positive and finite"),
        (
            lambda state: state.update({f"{Q}.scale_weight": torch.ones(3)}),
            r"has 3 scales for .*\.q\.weight of shape \[64, 64\]",
        ),
        (
            lambda state: state.update({f"{Q}.weight": state[f"{Q}.weight"].half()}),
            r"has a scale for .*\.q\.weight, which is not stored in eight bits",
        ),
        (
            lambda state: state.update(
                {f"{Q}.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)}
            ),
            r"stores .*\.q\.weight as 'nvfp4'; expected float8",
        ),
        (
            lambda state: state.update({f"{Q}.comfy_quant": torch.tensor([255, 1], dtype=torch.uint8)}),
            "which says nothing that is understood",
        ),
        (
            lambda state: state[f"{Q}.weight"].view(torch.uint8)[0].fill_(0x7F),
            r"layer\.0\.SelfAttention\.q\.weight holds 64 NaN",
        ),
    ],
)
def test_eight_bits_that_do_not_fit_are_refused_by_name(
    change: Callable[[State], object], message: str, tmp_path: Path
) -> None:
    state = comfyui()
    change(state)
    save_file(state, tmp_path / "encoder.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_umt5_state(tmp_path / "encoder.safetensors", UMT5_TINY)
    assert str(tmp_path / "encoder.safetensors") in str(caught.value)
