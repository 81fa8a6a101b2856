"""Models and validators against the published keys, shapes and parameter counts; nothing is allocated."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightforcing_ref.checkpoint.spec import (
    CheckpointKind,
    dit_shapes,
    kind_of,
    lora_targets,
    umt5_shapes,
    vae_decoder_shapes,
)
from lightforcing_ref.config import PRESETS
from lightforcing_ref.decoders.vae import VAEDecoder
from lightforcing_ref.dimensions import LIGHT_VAE, WAN_VAE, VAEConfig
from lightforcing_ref.model import CausalWanModel
from lightforcing_ref.text import UMT5_TINY, UMT5_XXL, UMT5Config, umt5_keys
from tests.lightforcing_ref.checkpoint import fixtures


def shapes_of(model: nn.Module) -> fixtures.Shapes:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "sizes", "tensors", "parameters"),
    [
        ("wan-1.3b", fixtures.DIT_1_3B, 825, 1_418_996_800),
        ("wan-14b", fixtures.DIT_14B, 1095, 14_288_491_584),  # 57,153,966,336 bytes in float32 at Wan-AI
    ],
)
def test_dit_has_the_published_tensors(
    name: str, sizes: dict[str, int], tensors: int, parameters: int
) -> None:
    published = fixtures.dit(sizes)
    config = PRESETS[name].dit
    with torch.device("meta"):
        model = CausalWanModel(config)
    assert shapes_of(model) == published
    assert dit_shapes(config) == published
    assert config.head_dim == 128
    assert len(published) == tensors
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert fixtures.count(published.values()) == parameters


def test_lora_targets_are_the_published_ones() -> None:
    published = fixtures.lora(fixtures.DIT_1_3B, rank=256)
    targets = lora_targets(PRESETS["wan-1.3b"].dit)
    prefix, suffix = "base_model.model.", ".lora_B.weight"
    outputs = {key: shape[0] for key, shape in published.items() if key.endswith(suffix)}
    assert {key: shape[0] for key, shape in targets.items()} == {
        key.removeprefix(prefix).removesuffix(suffix) + ".weight": out for key, out in outputs.items()
    }
    assert len(published) == 600


@pytest.mark.parametrize(
    ("config", "sizes", "parameters"),
    [
        (WAN_VAE, fixtures.VAE_WAN, 73_295_603),
        (LIGHT_VAE, fixtures.VAE_LIGHT, 4_617_611),
    ],
)
def test_vae_decoder_has_the_published_tensors(
    config: VAEConfig, sizes: dict[str, int], parameters: int
) -> None:
    published = fixtures.vae(sizes)
    with torch.device("meta"):
        model = VAEDecoder(config)
    assert shapes_of(model) == published
    assert vae_decoder_shapes(config) == published
    assert fixtures.count(published.values()) == parameters


def test_published_vae_sizes() -> None:
    """Full decoder with conv2: 73.3 M. Light decoder: 4.62 M, with or without conv2, and 0.25 times every width."""
    full, light = fixtures.vae(fixtures.VAE_WAN), fixtures.vae(fixtures.VAE_LIGHT)
    assert round(fixtures.count(full.values()) / 1e6, 1) == 73.3
    assert round(fixtures.count(light.values()) / 1e6, 2) == 4.62
    assert round(fixtures.count(shape for key, shape in light.items() if "conv2" not in key) / 1e6, 2) == 4.62
    assert {name: int(width * (1 - 0.75)) for name, width in fixtures.VAE_WAN.items()} == fixtures.VAE_LIGHT


@pytest.mark.parametrize(
    ("config", "sizes"), [(UMT5_XXL, fixtures.UMT5_XXL_SIZES), (UMT5_TINY, fixtures.UMT5_SMALL_SIZES)]
)
def test_umt5_has_the_published_tensors_in_both_layouts(config: UMT5Config, sizes: dict[str, int]) -> None:
    ours, keys = umt5_shapes(config), umt5_keys(config.layers)
    assert {key.wan: ours[key.name] for key in keys} == fixtures.umt5_wan(sizes)
    assert {key.hf: ours[key.name] for key in keys} == fixtures.umt5_hf(sizes)
    assert [key.hf for key in keys] == list(fixtures.umt5_hf(sizes))
    assert [key.wan for key in keys] == list(fixtures.umt5_wan(sizes))


def test_umt5_xxl_size() -> None:
    total = fixtures.count(fixtures.umt5_wan(fixtures.UMT5_XXL_SIZES).values())
    assert round(total / 1e9, 2) == 5.68


def test_transformers_umt5_has_the_published_tensors() -> None:
    from transformers import UMT5Config as HFConfig
    from transformers import UMT5EncoderModel

    sizes = fixtures.UMT5_XXL_SIZES
    with torch.device("meta"):
        model = UMT5EncoderModel(
            HFConfig(
                vocab_size=sizes["vocab"],
                d_model=sizes["dim"],
                d_ff=sizes["ffn"],
                d_kv=64,
                num_heads=sizes["heads"],
                num_layers=sizes["layers"],
                is_encoder_decoder=False,
            )
        )
    tied = {"encoder.embed_tokens.weight": (sizes["vocab"], sizes["dim"])}
    assert shapes_of(model) == fixtures.umt5_hf(sizes) | tied


@pytest.mark.parametrize(
    ("shapes", "kind"),
    [
        (fixtures.dit(fixtures.DIT_SMALL), CheckpointKind.DIT),
        (fixtures.lora(fixtures.DIT_SMALL, 4), CheckpointKind.LORA),
        (fixtures.vae_file(fixtures.VAE_SMALL), CheckpointKind.VAE),
        (fixtures.umt5_wan(fixtures.UMT5_SMALL_SIZES), CheckpointKind.UMT5),
        (fixtures.umt5_hf(fixtures.UMT5_SMALL_SIZES), CheckpointKind.UMT5),
        ({"decoder.1.weight": (64, 16, 3, 3), "encoder.0.weight": (64, 3, 3, 3)}, CheckpointKind.TAE),
        ({"resnet.conv1.weight": (2, 2)}, CheckpointKind.UNKNOWN),
        ({}, CheckpointKind.UNKNOWN),
    ],
)
def test_kind_is_told_by_the_keys(shapes: fixtures.Shapes, kind: CheckpointKind) -> None:
    assert kind_of(shapes) is kind
