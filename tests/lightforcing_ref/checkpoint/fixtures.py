"""Keys and shapes of the public checkpoints, typed from their published description, and small files made of them.

Nothing here comes from the code under test. A table has one tensor a line: its key and its dimensions, which are
numbers or names of sizes (`dim`, `dim*6`); `@` in a key stands for a layer's index.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

DIT_OUTER = """
patch_embedding.weight dim 16 1 2 2
patch_embedding.bias dim
text_embedding.0.weight dim text
text_embedding.0.bias dim
text_embedding.2.weight dim dim
text_embedding.2.bias dim
time_embedding.0.weight dim freq
time_embedding.0.bias dim
time_embedding.2.weight dim dim
time_embedding.2.bias dim
time_projection.1.weight dim*6 dim
time_projection.1.bias dim*6
head.head.weight 64 dim
head.head.bias 64
head.modulation 1 2 dim
"""

DIT_LAYER = """
blocks.@.self_attn.q.weight dim dim
blocks.@.self_attn.q.bias dim
blocks.@.self_attn.k.weight dim dim
blocks.@.self_attn.k.bias dim
blocks.@.self_attn.v.weight dim dim
blocks.@.self_attn.v.bias dim
blocks.@.self_attn.o.weight dim dim
blocks.@.self_attn.o.bias dim
blocks.@.self_attn.norm_q.weight dim
blocks.@.self_attn.norm_k.weight dim
blocks.@.cross_attn.q.weight dim dim
blocks.@.cross_attn.q.bias dim
blocks.@.cross_attn.k.weight dim dim
blocks.@.cross_attn.k.bias dim
blocks.@.cross_attn.v.weight dim dim
blocks.@.cross_attn.v.bias dim
blocks.@.cross_attn.o.weight dim dim
blocks.@.cross_attn.o.bias dim
blocks.@.cross_attn.norm_q.weight dim
blocks.@.cross_attn.norm_k.weight dim
blocks.@.norm3.weight dim
blocks.@.norm3.bias dim
blocks.@.ffn.0.weight ffn dim
blocks.@.ffn.0.bias ffn
blocks.@.ffn.2.weight dim ffn
blocks.@.ffn.2.bias dim
blocks.@.modulation 1 6 dim
"""

DIT_1_3B = {"dim": 1536, "ffn": 8960, "text": 4096, "freq": 256, "layers": 30}
DIT_14B = {"dim": 5120, "ffn": 13824, "text": 4096, "freq": 256, "layers": 40}
DIT_SMALL = {"dim": 16, "ffn": 24, "text": 12, "freq": 256, "layers": 2}

LORA_LAYER = """
base_model.model.blocks.@.self_attn.q.lora_A.weight rank dim
base_model.model.blocks.@.self_attn.q.lora_B.weight dim rank
base_model.model.blocks.@.self_attn.k.lora_A.weight rank dim
base_model.model.blocks.@.self_attn.k.lora_B.weight dim rank
base_model.model.blocks.@.self_attn.v.lora_A.weight rank dim
base_model.model.blocks.@.self_attn.v.lora_B.weight dim rank
base_model.model.blocks.@.self_attn.o.lora_A.weight rank dim
base_model.model.blocks.@.self_attn.o.lora_B.weight dim rank
base_model.model.blocks.@.cross_attn.q.lora_A.weight rank dim
base_model.model.blocks.@.cross_attn.q.lora_B.weight dim rank
base_model.model.blocks.@.cross_attn.k.lora_A.weight rank dim
base_model.model.blocks.@.cross_attn.k.lora_B.weight dim rank
base_model.model.blocks.@.cross_attn.v.lora_A.weight rank dim
base_model.model.blocks.@.cross_attn.v.lora_B.weight dim rank
base_model.model.blocks.@.cross_attn.o.lora_A.weight rank dim
base_model.model.blocks.@.cross_attn.o.lora_B.weight dim rank
base_model.model.blocks.@.ffn.0.lora_A.weight rank dim
base_model.model.blocks.@.ffn.0.lora_B.weight ffn rank
base_model.model.blocks.@.ffn.2.lora_A.weight rank ffn
base_model.model.blocks.@.ffn.2.lora_B.weight dim rank
"""

# Wan: top 384, half 192, quarter 96. The light decoder cuts each to int(d * (1 - 0.75)).
VAE_DECODER = """
conv2.weight 16 16 1 1 1
conv2.bias 16
decoder.conv1.weight top 16 3 3 3
decoder.conv1.bias top
residual decoder.middle.0 top top
decoder.middle.1.norm.gamma top 1 1
decoder.middle.1.to_qkv.weight top*3 top 1 1
decoder.middle.1.to_qkv.bias top*3
decoder.middle.1.proj.weight top top 1 1
decoder.middle.1.proj.bias top
residual decoder.middle.2 top top
residual decoder.upsamples.0 top top
residual decoder.upsamples.1 top top
residual decoder.upsamples.2 top top
decoder.upsamples.3.resample.1.weight half top 3 3
decoder.upsamples.3.resample.1.bias half
decoder.upsamples.3.time_conv.weight top*2 top 3 1 1
decoder.upsamples.3.time_conv.bias top*2
residual decoder.upsamples.4 half top
decoder.upsamples.4.shortcut.weight top half 1 1 1
decoder.upsamples.4.shortcut.bias top
residual decoder.upsamples.5 top top
residual decoder.upsamples.6 top top
decoder.upsamples.7.resample.1.weight half top 3 3
decoder.upsamples.7.resample.1.bias half
decoder.upsamples.7.time_conv.weight top*2 top 3 1 1
decoder.upsamples.7.time_conv.bias top*2
residual decoder.upsamples.8 half half
residual decoder.upsamples.9 half half
residual decoder.upsamples.10 half half
decoder.upsamples.11.resample.1.weight quarter half 3 3
decoder.upsamples.11.resample.1.bias quarter
residual decoder.upsamples.12 quarter quarter
residual decoder.upsamples.13 quarter quarter
residual decoder.upsamples.14 quarter quarter
decoder.head.0.gamma quarter 1 1 1
decoder.head.2.weight 3 quarter 3 3 3
decoder.head.2.bias 3
"""

RESIDUAL = """
KEY.residual.0.gamma IN 1 1 1
KEY.residual.2.weight OUT IN 3 3 3
KEY.residual.2.bias OUT
KEY.residual.3.gamma OUT 1 1 1
KEY.residual.6.weight OUT OUT 3 3 3
KEY.residual.6.bias OUT
"""

VAE_WAN = {"top": 384, "half": 192, "quarter": 96}
VAE_LIGHT = {"top": 96, "half": 48, "quarter": 24}
VAE_SMALL = {"top": 8, "half": 4, "quarter": 2}

# Some of what the files hold for the encoder.
VAE_ENCODER = """
conv1.weight 32 32 1 1 1
conv1.bias 32
encoder.conv1.weight quarter 3 3 3 3
encoder.conv1.bias quarter
encoder.downsamples.0.residual.0.gamma quarter 1 1 1
encoder.head.2.weight 32 top 3 3 3
"""

UMT5_WAN = """
token_embedding.weight vocab dim
norm.weight dim
"""
UMT5_WAN_LAYER = """
blocks.@.norm1.weight dim
blocks.@.attn.q.weight inner dim
blocks.@.attn.k.weight inner dim
blocks.@.attn.v.weight inner dim
blocks.@.attn.o.weight dim inner
blocks.@.pos_embedding.embedding.weight 32 heads
blocks.@.norm2.weight dim
blocks.@.ffn.gate.0.weight ffn dim
blocks.@.ffn.fc1.weight ffn dim
blocks.@.ffn.fc2.weight dim ffn
"""
UMT5_HF = """
shared.weight vocab dim
encoder.final_layer_norm.weight dim
"""
# Line by line the same tensors as in UMT5_WAN_LAYER.
UMT5_HF_LAYER = """
encoder.block.@.layer.0.layer_norm.weight dim
encoder.block.@.layer.0.SelfAttention.q.weight inner dim
encoder.block.@.layer.0.SelfAttention.k.weight inner dim
encoder.block.@.layer.0.SelfAttention.v.weight inner dim
encoder.block.@.layer.0.SelfAttention.o.weight dim inner
encoder.block.@.layer.0.SelfAttention.relative_attention_bias.weight 32 heads
encoder.block.@.layer.1.layer_norm.weight dim
encoder.block.@.layer.1.DenseReluDense.wi_0.weight ffn dim
encoder.block.@.layer.1.DenseReluDense.wi_1.weight ffn dim
encoder.block.@.layer.1.DenseReluDense.wo.weight dim ffn
"""

UMT5_XXL_SIZES = {"vocab": 256384, "dim": 4096, "inner": 4096, "heads": 64, "ffn": 10240, "layers": 24}
UMT5_SMALL_SIZES = {"vocab": 259, "dim": 64, "inner": 64, "heads": 4, "ffn": 128, "layers": 2}


def expand(table: str, sizes: dict[str, int], layer: int | None = None) -> Shapes:
    """The shapes of one table, for one layer where the table describes a layer."""
    shapes: Shapes = {}
    for line in table.split("\n"):
        if line.startswith("residual "):
            _, key, in_dim, out_dim = line.split()
            text = RESIDUAL.replace("KEY", key).replace("IN", in_dim).replace("OUT", out_dim)
            shapes |= expand(text, sizes)
        elif line:
            key, *dimensions = line.split()
            shapes[key.replace("@", str(layer))] = tuple(_size(text, sizes) for text in dimensions)
    return shapes


def _size(text: str, sizes: dict[str, int]) -> int:
    return math.prod(int(part) if part.isdigit() else sizes[part] for part in text.split("*"))


def layered(outer: str, layer_table: str, sizes: dict[str, int]) -> Shapes:
    shapes = expand(outer, sizes)
    for layer in range(sizes["layers"]):
        shapes |= expand(layer_table, sizes, layer)
    return shapes


def dit(sizes: dict[str, int]) -> Shapes:
    return layered(DIT_OUTER, DIT_LAYER, sizes)


def lora(sizes: dict[str, int], rank: int) -> Shapes:
    return layered("", LORA_LAYER, sizes | {"rank": rank})


def vae(sizes: dict[str, int]) -> Shapes:
    return expand(VAE_DECODER, sizes)


def vae_file(sizes: dict[str, int]) -> Shapes:
    """The decoder together with an encoder, as the files have it."""
    return expand(VAE_DECODER, sizes) | expand(VAE_ENCODER, sizes)


def umt5_wan(sizes: dict[str, int]) -> Shapes:
    return layered(UMT5_WAN, UMT5_WAN_LAYER, sizes)


def umt5_hf(sizes: dict[str, int]) -> Shapes:
    return layered(UMT5_HF, UMT5_HF_LAYER, sizes)


def count(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def tensors(shapes: Shapes, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def write_shards(
    folder: Path, state: dict[str, Tensor], shards: int = 3, suffix: str = "safetensors"
) -> Path:
    """Write a sharded checkpoint and its index, whose path is returned."""
    weight_map = {}
    stem = "diffusion_pytorch_model" if suffix == "safetensors" else "pytorch_model"
    keys = list(state)
    for shard in range(shards):
        name = f"{stem}-{shard + 1:05}-of-{shards:05}.{suffix}"
        part = {key: state[key] for key in keys[shard::shards]}
        if suffix == "safetensors":
            save_file(part, folder / name)
        else:
            torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index
