"""What the public checkpoints hold, key by key, and what a file that does not match looks like.

Source: the published state dicts of Self-Forcing, LongLive, Light Forcing, Wan2.1 and LightX2V.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from lightforcing_ref.config import DiTConfig
from lightforcing_ref.decoders.tae import BLOCKS, TAEConfig
from lightforcing_ref.dimensions import VAEConfig
from lightforcing_ref.errors import CheckpointError
from lightforcing_ref.text import UMT5Config, umt5_keys

__all__ = [
    "LINEAR_BRANCH",
    "CheckpointKind",
    "Expectation",
    "Shapes",
    "check_state",
    "dit_shapes",
    "kind_of",
    "lora_targets",
    "tae_decoder_shapes",
    "umt5_shapes",
    "vae_decoder_shapes",
    "vae_encoder_shapes",
]

Shapes = dict[str, tuple[int, ...]]
"""Shape of every tensor by its key."""


class CheckpointKind(StrEnum):
    """What a checkpoint holds, recognised by its keys."""

    DIT = "dit"
    LORA = "lora"
    VAE = "vae"
    UMT5 = "umt5"
    TAE = "tae"
    UNKNOWN = "unknown"


LINEAR_BRANCH = "proj_l"
"""The projection of SLA's linear branch, one for all heads of a layer's self-attention."""

_KINDS = {
    CheckpointKind.DIT: ("a Wan diffusion transformer", "pass it as --checkpoint"),
    CheckpointKind.LORA: (
        "a LoRA",
        "pass it as --lora, and the model that it was trained on as --checkpoint",
    ),
    CheckpointKind.VAE: ("a Wan VAE", "pass it as --vae"),
    CheckpointKind.UMT5: ("a UMT5 text encoder", "pass it as --text-encoder"),
    CheckpointKind.TAE: ("a tiny autoencoder", "of Wan 2.1's, pass it as --vae: taew2_1 or lighttaew2_1"),
    CheckpointKind.UNKNOWN: ("nothing that is known here", "check that it is the right file"),
}
"""A noun for each kind, and what to do with a file of that kind in the wrong place."""

_MARKS: tuple[tuple[CheckpointKind, tuple[str, ...]], ...] = (
    (CheckpointKind.DIT, ("patch_embedding.weight", "blocks.0.self_attn.q.weight")),
    (
        CheckpointKind.VAE,
        ("decoder.conv1.weight", "decoder.middle.0.residual.0.gamma", "decoder.head.2.weight"),
    ),
    (CheckpointKind.UMT5, ("blocks.0.attn.q.weight", "encoder.block.0.layer.0.SelfAttention.q.weight")),
    (CheckpointKind.TAE, ("decoder.1.weight",)),
)


def kind_of(keys: Collection[str]) -> CheckpointKind:
    """Recognise a checkpoint by its keys, with wrappers' prefixes removed."""
    if any(".lora_A." in key or ".lora_B." in key for key in keys):
        return CheckpointKind.LORA
    for kind, marks in _MARKS:
        if any(mark in keys for mark in marks):
            return kind
    return CheckpointKind.UNKNOWN


# ---- the tables ----


def _linear(key: str, out_dim: int, in_dim: int) -> Shapes:
    return {f"{key}.weight": (out_dim, in_dim), f"{key}.bias": (out_dim,)}


def _conv(key: str, out_dim: int, in_dim: int, *kernel: int) -> Shapes:
    return {f"{key}.weight": (out_dim, in_dim, *kernel), f"{key}.bias": (out_dim,)}


def dit_shapes(config: DiTConfig) -> Shapes:
    """The causal Wan transformer, without a prefix."""
    dim, head_dim = config.dim, config.head_dim
    shapes: Shapes = {}
    shapes |= _conv("patch_embedding", dim, config.channels, *config.patch)
    shapes |= _linear("text_embedding.0", dim, config.text_dim) | _linear("text_embedding.2", dim, dim)
    shapes |= _linear("time_embedding.0", dim, config.freq_dim) | _linear("time_embedding.2", dim, dim)
    shapes |= _linear("time_projection.1", 6 * dim, dim)
    for layer in range(config.layers):
        block = f"blocks.{layer}"
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                shapes |= _linear(f"{block}.{attention}.{part}", dim, dim)
            shapes |= {f"{block}.{attention}.norm_{part}.weight": (dim,) for part in "qk"}
        if config.linear_branch:
            shapes |= _linear(f"{block}.self_attn.{LINEAR_BRANCH}", head_dim, head_dim)
        shapes |= {f"{block}.norm3.weight": (dim,), f"{block}.norm3.bias": (dim,)}
        shapes |= _linear(f"{block}.ffn.0", config.ffn_dim, dim)
        shapes |= _linear(f"{block}.ffn.2", dim, config.ffn_dim)
        shapes[f"{block}.modulation"] = (1, 6, dim)
    patch = config.patch[0] * config.patch[1] * config.patch[2]
    shapes |= _linear("head.head", patch * config.channels, dim)
    shapes["head.modulation"] = (1, 2, dim)
    return shapes


def lora_targets(config: DiTConfig) -> Shapes:
    """The matrices that LongLive's LoRA changes."""
    parts = {f"{attention}.{part}" for attention in ("self_attn", "cross_attn") for part in "qkvo"}
    parts |= {"ffn.0", "ffn.2"}
    shapes = dit_shapes(config)
    return {
        key: shapes[key]
        for layer in range(config.layers)
        for key in (f"blocks.{layer}.{part}.weight" for part in sorted(parts))
    }


def vae_decoder_shapes(config: VAEConfig) -> Shapes:
    """The video decoder of any width, without the encoder that the files may hold too."""
    middle, *stages = config.widths
    shapes = _conv("conv2", config.z_dim, config.z_dim, 1, 1, 1)
    shapes |= _conv("decoder.conv1", middle, config.z_dim, 3, 3, 3)
    shapes |= _middle("decoder.middle", middle)
    width, index = middle, 0
    for stage, out_dim in enumerate(stages):
        for _ in range(config.num_res_blocks + 1):
            shapes |= _residual(f"decoder.upsamples.{index}", width, out_dim)
            width, index = out_dim, index + 1
        if stage < len(config.temporal_upsample):
            key = f"decoder.upsamples.{index}"
            if config.temporal_upsample[stage]:
                shapes |= _conv(f"{key}.time_conv", 2 * width, width, 3, 1, 1)
            shapes |= _conv(f"{key}.resample.1", width // 2, width, 3, 3)
            width, index = width // 2, index + 1
    shapes["decoder.head.0.gamma"] = (width, 1, 1, 1)
    return shapes | _conv("decoder.head.2", 3, width, 3, 3, 3)


def vae_encoder_shapes(config: VAEConfig) -> Shapes:
    """The video encoder of any width, without the decoder that the files hold too."""
    stages = config.widths[:0:-1]
    shapes = _conv("encoder.conv1", config.dim, 3, 3, 3, 3)
    width, index = config.dim, 0
    for stage, out_dim in enumerate(stages):
        for _ in range(config.num_res_blocks):
            shapes |= _residual(f"encoder.downsamples.{index}", width, out_dim)
            width, index = out_dim, index + 1
        if stage < len(config.temporal_upsample):
            key = f"encoder.downsamples.{index}"
            shapes |= _conv(f"{key}.resample.1", width, width, 3, 3)
            if config.temporal_upsample[-1 - stage]:
                shapes |= _conv(f"{key}.time_conv", width, width, 3, 1, 1)
            index += 1
    shapes |= _middle("encoder.middle", width)
    shapes["encoder.head.0.gamma"] = (width, 1, 1, 1)
    shapes |= _conv("encoder.head.2", 2 * config.z_dim, width, 3, 3, 3)
    return shapes | _conv("conv1", 2 * config.z_dim, 2 * config.z_dim, 1, 1, 1)


def _middle(key: str, width: int) -> Shapes:
    """Two residual blocks around the attention of each frame's pixels."""
    shapes = _residual(f"{key}.0", width, width) | {f"{key}.1.norm.gamma": (width, 1, 1)}
    shapes |= _conv(f"{key}.1.to_qkv", 3 * width, width, 1, 1)
    shapes |= _conv(f"{key}.1.proj", width, width, 1, 1)
    return shapes | _residual(f"{key}.2", width, width)


def _residual(key: str, in_dim: int, out_dim: int) -> Shapes:
    shapes: Shapes = {
        f"{key}.residual.0.gamma": (in_dim, 1, 1, 1),
        f"{key}.residual.3.gamma": (out_dim, 1, 1, 1),
    }
    shapes |= _conv(f"{key}.residual.2", out_dim, in_dim, 3, 3, 3)
    shapes |= _conv(f"{key}.residual.6", out_dim, out_dim, 3, 3, 3)
    if in_dim != out_dim:
        shapes |= _conv(f"{key}.shortcut", out_dim, in_dim, 1, 1, 1)
    return shapes


def tae_decoder_shapes(config: TAEConfig) -> Shapes:
    """The tiny decoder, without the encoder that the files hold too."""
    shapes = _conv("decoder.1", config.widths[0], config.z_dim, 3, 3)
    index = 3  # behind the clamp, the first convolution and its activation
    for width, out_dim, doubled in zip(
        config.widths, config.widths[1:], config.temporal_upsample, strict=False
    ):
        for _ in range(BLOCKS):
            for part, inputs in ((0, 2 * width), (2, width), (4, width)):
                shapes |= _conv(f"decoder.{index}.conv.{part}", width, inputs, 3, 3)
            index += 1
        shapes[f"decoder.{index + 1}.conv.weight"] = (2 * width if doubled else width, width, 1, 1)
        shapes[f"decoder.{index + 2}.weight"] = (out_dim, width, 3, 3)
        index += 3
    return shapes | _conv(f"decoder.{index + 1}", 3, config.widths[-1], 3, 3)


def umt5_shapes(config: UMT5Config) -> Shapes:
    """The text encoder under our names; `text.umt5_keys` gives the two public ones."""
    inner = config.heads * config.d_kv
    parts: Shapes = {
        "norm1": (config.d_model,),
        **dict.fromkeys("qkv", (inner, config.d_model)),
        "o": (config.d_model, inner),
        "rel_bias": (config.buckets, config.heads),
        "norm2": (config.d_model,),
        "gate": (config.d_ff, config.d_model),
        "fc1": (config.d_ff, config.d_model),
        "fc2": (config.d_model, config.d_ff),
    }
    outer: Shapes = {"token_embedding": (config.vocab, config.d_model), "norm": (config.d_model,)}
    return {
        key.name: outer.get(key.name) or parts[key.name.split(".")[-1]] for key in umt5_keys(config.layers)
    }


# ---- the comparison ----


@dataclass(frozen=True)
class Expectation:
    """What a file is expected to be, for messages, and what it must hold."""

    kind: CheckpointKind
    model: str
    shapes: Shapes
    others: Mapping[str, Shapes] = field(default_factory=dict)
    """The same for other presets, by name: what is one of these is called so."""


def check_state(state: Mapping[str, Tensor], expected: Expectation, source: str) -> None:
    """Compare keys, shapes and types of a state dict with what is expected.

    Raises:
        CheckpointError: anything differs; the message says what, and what the file looks like instead.
    """
    shapes = expected.shapes
    shared = [key for key in shapes if key in state]
    differences = [
        _listing("missing", [key for key in shapes if key not in state]),
        _listing("unexpected", [key for key in state if key not in shapes]),
        _listing(
            "of another shape",
            [
                f"{key} is {list(state[key].shape)}, expected {list(shapes[key])}"
                for key in shared
                if tuple(state[key].shape) != shapes[key]
            ],
        ),
        _listing(
            "of a type that is not supported (expected plain floating point)",
            [f"{key} is {_type_name(state[key])}" for key in shared if not _is_plain_float(state[key])],
        ),
        _listing(
            "without plain values in memory order (expected dense tensors)",
            [f"{key} is {_layout(state[key])}" for key in shared if _layout(state[key])],
        ),
    ]
    if not any(differences):
        return
    found = {key: tuple(value.shape) for key, value in state.items()}
    for name, shapes in expected.others.items():
        if found == shapes:
            raise CheckpointError(
                f"{source} does not hold {expected.model}: it is that of the preset {name}; use --preset {name}, or "
                "the file of the preset that was asked for"
            )
    kind = kind_of(state)
    noun, advice = _KINDS[kind]
    if kind == expected.kind:
        noun, advice = f"{noun} of another size or release", "use the file that was published for this model"
    raise CheckpointError(
        f"{source} does not hold {expected.model}: {'; '.join(filter(None, differences))}. "
        f"It looks like {noun}; {advice}."
    )


def _listing(what: str, items: list[str], limit: int = 4) -> str:
    if not items:
        return ""
    more = ", ..." if len(items) > limit else ""
    return f"{len(items)} {what} ({', '.join(items[:limit])}{more})"


def _type_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _layout(tensor: Tensor) -> str:
    """What keeps a tensor from being read like any other; empty where nothing does."""
    if tensor.is_meta:
        return "on the meta device, without values"
    return "" if tensor.layout is torch.strided else str(tensor.layout).removeprefix("torch.")


def _is_plain_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() > 1
