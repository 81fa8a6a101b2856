"""Strict loading of the public checkpoints.

Each loader returns a state dict with exactly the keys and shapes of the model it is for, or raises a `CheckpointError`
that says what differs. Tensors are mapped from the file until they are used; load them with
`model.load_state_dict(state, assign=True)` into a model built on the meta device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightforcing_ref.config import PRESETS, DiTConfig
from lightforcing_ref.decoders.tae import TAEConfig
from lightforcing_ref.dimensions import WAN_VAE, DecoderConfig, VAEConfig
from lightforcing_ref.errors import CheckpointError
from lightforcing_ref.text import UMT5Config, umt5_keys

from .files import checkpoint_files, checkpoint_sha256, file_identity, read_checkpoint
from .layouts import LazyState, from_diffusers, linear_branch_key, wider
from .lora import MergedLoRA, lora_scale
from .spec import (
    LINEAR_BRANCH,
    CheckpointKind,
    Expectation,
    Shapes,
    check_state,
    dit_shapes,
    kind_of,
    lora_targets,
    tae_decoder_shapes,
    umt5_shapes,
    vae_decoder_shapes,
    vae_encoder_shapes,
)
from .values import check_values

__all__ = [
    "SECTIONS",
    "CheckpointKind",
    "checkpoint_kind",
    "checkpoint_sha256",
    "has_linear_branch",
    "load_dit_state",
    "load_lora",
    "load_umt5_state",
    "load_vae_encoder_state",
    "load_vae_state",
    "merge_loras",
    "vae_config_of",
]

SECTIONS = ("generator_ema", "generator", "generator_lora", "model")
"""Groups of a training checkpoint that hold a model for inference, best first: the running average of a generator
before the generator itself, and `model`, which LongLive's script takes where there is neither."""

_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")
"""Sharding, compiling and activation checkpointing put their names anywhere into a key."""

_OUTER = ("base_model.model.", "module.", "model.", "diffusion_model.", "transformer.")
"""PEFT, data parallelism, training scripts, ComfyUI and Diffusers' LoRAs put theirs in front."""

_VAE_ENCODER = ("encoder.", "conv1.")
_VAE_DECODER = ("decoder.", "conv2.")
_TAE_ENCODER = ("encoder.",)
_UMT5_DECODER = ("decoder.", "lm_head.")
_UMT5_TOKENIZER = "spiece_model"  # ComfyUI keeps the tokenizer in the file
"""Known parts of the public files that are not needed here."""

_LIGHT_TAE = "lighttae"
"""How the names of LightTAE's files begin."""

_JUDGED: set[tuple[object, ...]] = set()
"""What of checkpoints was looked at in this process: the part, and the files."""

LoRA = dict[str, tuple[Tensor, Tensor]]
"""By the key of the matrix it changes: A `[rank, in]` and B `[out, rank]`."""


def checkpoint_kind(path: str | Path) -> CheckpointKind:
    """What a checkpoint holds, by its keys.

    Raises:
        CheckpointError: the file cannot be read.
    """
    return kind_of(_read_state(path))


def has_linear_branch(path: str | Path, *, section: str | None = None) -> bool:
    """Whether a transformer's checkpoint holds a projection of SLA's linear branch, in any layer.

    `load_dit_state` of a model with the branch asks for those of all layers.

    Raises:
        CheckpointError: the file cannot be read.
    """
    state = _state_of(read_checkpoint(path), path, section)
    return any(f".self_attn.{LINEAR_BRANCH}." in key for key in state)


def load_dit_state(
    path: str | Path,
    config: DiTConfig,
    *,
    section: str | None = None,
    loras: Sequence[MergedLoRA] = (),
    dtype: torch.dtype | None = None,
    any_values: bool = False,
) -> dict[str, Tensor]:
    """The transformer out of a Self-Forcing, LongLive, Light Forcing, Wan-AI or Diffusers checkpoint.

    Args:
        path: file, shard index, or folder.
        config: the model that the state is for.
        section: the group of a training checkpoint to take; None = the first of `SECTIONS` that it has.
        loras: LoRAs to merge into the weights, in this order.
        dtype: type to convert to; None leaves each tensor as stored.
        any_values: take values that no trained model holds, too; see `check_values`.

    Raises:
        CheckpointError: a file cannot be read, or does not hold this model.
    """
    state = _state_of(read_checkpoint(path), path, section)
    model = f"a causal Wan transformer of dim {config.dim} with {config.layers} layers"
    others = {name: dit_shapes(preset.dit) for name, preset in PRESETS.items() if preset.dit != config}
    expected = Expectation(CheckpointKind.DIT, model, dit_shapes(config), others)
    check_state(state, expected, str(path))
    if not any_values:
        _judge(state, path, section)
    if loras:
        state = merge_loras(
            state,
            [(load_lora(one.path, config, any_values=any_values), one.strength) for one in loras],
            dtype=dtype,
        )
    return _arrange(state, expected, dtype)


def load_lora(path: str | Path, config: DiTConfig, *, any_values: bool = False) -> LoRA:
    """The LoRA of a transformer of size `config`, of any rank, complete for every matrix it is expected to change.

    B is multiplied by the scale that alpha and rank give where they are stated; see `lora_scale`.

    Raises:
        CheckpointError: the file cannot be read, is no such LoRA, or its alpha or settings are not usable.
    """
    content = read_checkpoint(path)
    state = _state_of(content, path)
    keys = {target: _lora_keys(target) for target in lora_targets(config)}
    alphas = {
        target: state.pop(key)
        for target in keys
        if (key := f"{target.removesuffix('.weight')}.alpha") in state
    }
    others = {
        name: _lora_shapes(state, preset.dit) for name, preset in PRESETS.items() if preset.dit != config
    }
    model = f"a LoRA for a causal Wan transformer of dim {config.dim} with {config.layers} layers"
    expected = Expectation(CheckpointKind.LORA, model, _lora_shapes(state, config), others)
    check_state(state, expected, str(path))
    if not any_values:
        check_values(state | alphas, str(path), zeros=True)
    stated = lora_scale(path, content)
    lora: LoRA = {}
    for target, (key_a, key_b) in keys.items():
        a, b = state[key_a], state[key_b]
        scale = float(alphas[target]) / len(a) if target in alphas else stated.of(len(a))
        lora[target] = (a, b if scale == 1 else b.to(torch.promote_types(b.dtype, torch.float32)) * scale)
    return lora


def _lora_shapes(state: Mapping[str, Tensor], config: DiTConfig) -> Shapes:
    """The shapes of a LoRA for `config`, of the rank that each pair of `state` has."""
    shapes: Shapes = {}
    for target, (out_dim, in_dim) in lora_targets(config).items():
        key_a, key_b = _lora_keys(target)
        known = state[key_a].shape[:1] if key_a in state else state[key_b].shape[1:] if key_b in state else ()
        rank = known[0] if known else 0
        shapes |= {key_a: (rank, in_dim), key_b: (out_dim, rank)}
    return shapes


def _lora_keys(target: str) -> tuple[str, str]:
    stem = target.removesuffix(".weight")
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def merge_loras(
    state: Mapping[str, Tensor], loras: Sequence[tuple[LoRA, float]], *, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """A copy of a state dict with `W + s1 B1 A1 + s2 B2 A2 + ...` in place of each matrix of the LoRAs.

    Every other tensor is shared. The sum is computed in float32 at least, in the order of the LoRAs, and rounded once,
    to `dtype` or to the type of W.
    """
    merged = dict(state)
    for key in dict.fromkeys(key for lora, _ in loras for key in lora):
        weight = state[key]
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = weight.to(wide)
        for lora, strength in loras:
            if key in lora:
                a, b = lora[key]
                total = torch.addmm(total, b.to(wide), a.to(wide), alpha=strength)
        merged[key] = total.to(dtype or weight.dtype)
    return merged


def load_vae_state(
    path: str | Path, config: DecoderConfig, *, dtype: torch.dtype | None = None, any_values: bool = False
) -> dict[str, Tensor]:
    """The decoder out of `Wan2.1_VAE.pth`, `lightvaew2_1.pth`, `taew2_1.pth` or `lighttaew2_1.pth`, without encoder.

    Raises:
        CheckpointError: the file cannot be read, or does not hold this decoder.
    """
    state, expected = _vae_decoder(_read_state(path), config, path)
    if not any_values:
        _judge(state, path, "decoder")
    return _arrange(state, expected, dtype)


def load_vae_encoder_state(
    path: str | Path, config: VAEConfig, *, dtype: torch.dtype | None = None, any_values: bool = False
) -> dict[str, Tensor]:
    """The encoder out of `Wan2.1_VAE.pth` or `lightvaew2_1.pth`, without decoder.

    Raises:
        CheckpointError: the file cannot be read, or does not hold this encoder.
    """
    state = _read_state(path)
    if kind_of(state) == CheckpointKind.VAE and not any(key.startswith(_VAE_ENCODER) for key in state):
        raise CheckpointError(
            f"{path} holds a decoder and no encoder; pass a file that has both, as Wan2.1_VAE.pth and "
            "lightvaew2_1.pth do; --encoder takes it from a file of its own"
        )
    state = _without(state, _VAE_DECODER, CheckpointKind.VAE)
    model = f"a Wan video encoder of width {config.dim}"
    expected = Expectation(CheckpointKind.VAE, model, vae_encoder_shapes(config))
    check_state(state, expected, str(path))
    if not any_values:
        _judge(state, path, "encoder")
    return _arrange(state, expected, dtype)


def vae_config_of(path: str | Path) -> DecoderConfig:
    """The decoder in a checkpoint: Wan's, full, light or of another width, or a tiny one.

    LightTAE takes denormalised latents, and TAEHV normalised ones; their tensors have the same names and shapes, so
    the file's name decides: it begins with `lighttae`, as published, or it does not.

    Raises:
        CheckpointError: the file cannot be read, or holds no known decoder.
    """
    state = _read_state(path)
    if kind_of(state) == CheckpointKind.TAE:
        tiny = _tae_config(state, denormalise=Path(path).name.lower().startswith(_LIGHT_TAE))
        _vae_decoder(state, tiny, path)
        return tiny
    head = state.get("decoder.head.2.weight")
    config = WAN_VAE if head is None or head.ndim < 2 else VAEConfig(dim=head.shape[1])
    _vae_decoder(state, config, path)
    return config


def _tae_config(state: Mapping[str, Tensor], *, denormalise: bool) -> TAEConfig:
    """The widths of a tiny decoder by its tensors; those of `taew2_1` where they cannot be told."""
    keys = ("decoder.1.weight", "decoder.8.weight", "decoder.14.weight", "decoder.20.weight")
    found = [state[key].shape for key in keys if key in state]
    if len(found) < len(keys) or not all(found):
        return TAEConfig(denormalise=denormalise)
    return TAEConfig(widths=tuple(shape[0] for shape in found), denormalise=denormalise)


def load_umt5_state(
    path: str | Path, config: UMT5Config, *, dtype: torch.dtype | None = None, any_values: bool = False
) -> Mapping[str, Tensor]:
    """The text encoder out of Wan's `models_t5_umt5-xxl-enc-bf16.pth` or a Hugging Face UMT5, under our names.

    The names are those of `text.umt5_keys`; `text.build_encoder` takes the result. A file may hold its matrices in
    eight bits, with scales or without; see `layouts.wider`: each is then widened whenever it is asked for.

    Raises:
        CheckpointError: the file cannot be read, or does not hold this encoder.
    """
    state = _read_state(path)
    state.pop(_UMT5_TOKENIZER, None)
    is_wan = "token_embedding.weight" in state
    if not is_wan:
        state = _without(state, _UMT5_DECODER, CheckpointKind.UMT5)
        # The table has two names in memory; a safetensors file keeps only one of them.
        tied = state.pop("encoder.embed_tokens.weight", None)
        if tied is not None:
            state.setdefault("shared.weight", tied)
    names = {key.wan if is_wan else key.hf: key.name for key in umt5_keys(config.layers)}
    model = f"a UMT5 encoder of dim {config.d_model} with {config.layers} layers"
    others = {
        name: _public_shapes(preset.text, is_wan) for name, preset in PRESETS.items() if preset.text != config
    }
    expected = Expectation(CheckpointKind.UMT5, model, _public_shapes(config, is_wan), others)
    values, described = wider(state, str(path))
    check_state(described, expected, str(path))
    if not any_values:
        _judge(values, path)
    if isinstance(values, LazyState):
        return LazyState({names[key]: partial(_converted, values, key, dtype) for key in expected.shapes})
    return {names[key]: _converted(values, key, dtype) for key in expected.shapes}


def _converted(state: Mapping[str, Tensor], key: str, dtype: torch.dtype | None) -> Tensor:
    value = state[key]
    return value if dtype is None else value.to(dtype)


def _public_shapes(config: UMT5Config, is_wan: bool) -> Shapes:
    """The text encoder's shapes under the names that Wan's or Transformers' files have."""
    shapes = umt5_shapes(config)
    return {key.wan if is_wan else key.hf: shapes[key.name] for key in umt5_keys(config.layers)}


def _judge(state: Mapping[str, Tensor], path: str | Path, part: str | None = None) -> None:
    """Look at the values of a file's tensors, once per process: a build loads each file again and again.

    Args:
        part: of a file that is not loaded as a whole: its decoder, its encoder, or the section that was asked for.
    """
    looked_at = (part, *((file, file_identity(file)) for file in checkpoint_files(path)))
    if looked_at not in _JUDGED:
        check_values(state, str(path))
        _JUDGED.add(looked_at)


def _read_state(path: str | Path) -> dict[str, Tensor]:
    """The flat state dict of a checkpoint, freed of the section it lies in and of wrappers' prefixes."""
    return _state_of(read_checkpoint(path), path)


def _state_of(content: Mapping[str, Any], path: str | Path, section: str | None = None) -> dict[str, Tensor]:
    there = [name for name in SECTIONS if isinstance(content.get(name), Mapping) and content[name]]
    if section is not None and section not in there:
        raise CheckpointError(
            f"{path} has no section {section!r}; it has {', '.join(there) or 'none, and is one model as it is'}"
        )
    taken = section or (there[0] if there else None)
    state: dict[str, Tensor] = {}
    for raw_key, value in (content if taken is None else content[taken]).items():
        if not isinstance(value, Tensor):
            found = ", ".join(f"{key} ({type(item).__name__})" for key, item in list(content.items())[:6])
            raise CheckpointError(
                f"{path} holds {found}; expected tensors by name, or such tensors under one of {', '.join(SECTIONS)}"
            )
        key = _bare(str(raw_key))
        if key in state:
            raise CheckpointError(f"{path} holds {key!r} twice, with and without a prefix; expected it once")
        state[key] = value.detach()
    renamed: dict[str, Tensor] = {}
    for raw_key, value in from_diffusers(state).items():
        if (key := linear_branch_key(raw_key)) in renamed:
            raise CheckpointError(f"{path} holds {key!r} under two names; expected it once")
        renamed[key] = value
    return renamed


def _bare(key: str) -> str:
    """A key without what wrappers added to it."""
    for wrapper in _WRAPPERS:
        key = key.replace(wrapper, "")
    while prefix := next((prefix for prefix in _OUTER if key.startswith(prefix)), ""):
        key = key.removeprefix(prefix)
    return key


def _vae_decoder(
    state: dict[str, Tensor], config: DecoderConfig, path: str | Path
) -> tuple[dict[str, Tensor], Expectation]:
    if isinstance(config, TAEConfig):
        state = _without(state, _TAE_ENCODER, CheckpointKind.TAE)
        model = f"a tiny video decoder of widths {', '.join(map(str, config.widths))}"
        expected = Expectation(CheckpointKind.TAE, model, tae_decoder_shapes(config))
        check_state(state, expected, str(path))
        return state, expected
    state = _without(state, _VAE_ENCODER, CheckpointKind.VAE)
    model = f"a Wan video decoder of width {config.dim}"
    expected = Expectation(CheckpointKind.VAE, model, vae_decoder_shapes(config))
    check_state(state, expected, str(path))
    return state, expected


def _without(state: dict[str, Tensor], prefixes: tuple[str, ...], kind: CheckpointKind) -> dict[str, Tensor]:
    """A copy without the parts that a file of this kind is known to hold besides; files of other kinds stay whole."""
    if kind_of(state) != kind:
        return dict(state)
    return {key: value for key, value in state.items() if not key.startswith(prefixes)}


def _arrange(
    state: Mapping[str, Tensor], expected: Expectation, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    return {key: _converted(state, key, dtype) for key in expected.shapes}
