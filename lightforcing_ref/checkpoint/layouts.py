"""Layouts that other libraries keep the models in: Diffusers' names of tensors, those of the modules that SLA's
projections lie in, and matrices in eight bits.

Diffusers renames Wan's tensors and changes none. A pipeline's folder (`model_index.json`) has a folder for each model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from lightforcing_ref.errors import CheckpointError

from .spec import LINEAR_BRANCH

__all__ = ["LazyState", "from_diffusers", "in_pipeline", "linear_branch_key", "wider"]

_PIPELINE: Final = "model_index.json"

_RESIDUAL: Final = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
_STAGE: Final = 4
"""Entries of Wan's `upsamples` for one of Diffusers' `up_blocks`: three residual blocks and what enlarges."""

_TRANSFORMER: Final[tuple[tuple[str, str], ...]] = (
    (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out\.", "head.head."),
    (r"^(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
    (r"^(blocks\.\d+)\.attn1\.", r"\1.self_attn."),
    (r"^(blocks\.\d+)\.attn2\.", r"\1.cross_attn."),
    (r"^(blocks\.\d+\.\w+_attn)\.to_out\.0\.", r"\1.o."),
    (r"^(blocks\.\d+\.\w+_attn)\.to_([qkv])\.", r"\1.\2."),
    (r"^(blocks\.\d+)\.ffn\.net\.0\.proj\.", r"\1.ffn.0."),
    (r"^(blocks\.\d+)\.ffn\.net\.2\.", r"\1.ffn.2."),
    # Named by their order there: the norm before cross-attention is the second, and the third in Wan's files.
    (r"^(blocks\.\d+)\.norm2\.", r"\1.norm3."),
)
_VAE: Final[tuple[tuple[str, str], ...]] = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"^(\w+)\.conv_in\.", r"\1.conv1."),
    (r"^(\w+)\.norm_out\.", r"\1.head.0."),
    (r"^(\w+)\.conv_out\.", r"\1.head.2."),
    (r"^(\w+)\.mid_block\.attentions\.0\.", r"\1.middle.1."),
    (r"^(\w+)\.mid_block\.resnets\.0\.", r"\1.middle.0."),
    (r"^(\w+)\.mid_block\.resnets\.1\.", r"\1.middle.2."),
    (r"^encoder\.down_blocks\.", "encoder.downsamples."),
)
_LINEAR_BRANCH: Final = re.compile(
    rf"^(blocks\.\d+\.self_attn)\.(?:attn_op\.local_attn|local_attn|attn_impl)\.({LINEAR_BRANCH}\.\w+)$"
)
"""Where TurboDiffusion, SGLang and FastVideo keep the projection of SLA's linear branch."""
_UP_BLOCK: Final = re.compile(r"^decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.")
_IN_RESIDUAL: Final = re.compile(rf"^(\w+\.(?:middle|downsamples|upsamples)\.\d+)\.({'|'.join(_RESIDUAL)})\.")


def in_pipeline(path: Path, model: str) -> Path:
    """The folder of `model` where `path` is that of one of Diffusers' pipelines; else `path` itself."""
    return path / model if (path / _PIPELINE).is_file() and (path / model).is_dir() else path


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under Wan's names where it has those of Diffusers; others stay as they are."""
    renamed = _renaming(state)
    if renamed is None:
        return dict(state)
    found = {renamed(key): value for key, value in state.items()}
    # Two names that become one would lose a tensor; no file of Diffusers' has such, and others are told as they are.
    return found if len(found) == len(state) else dict(state)


def linear_branch_key(key: str) -> str:
    """A key of SLA's projection as a part of self-attention itself; any other key as it is."""
    return _LINEAR_BRANCH.sub(r"\1.\2", key)


def _renaming(keys: Mapping[str, object]) -> Callable[[str], str] | None:
    if any(re.match(r"(condition_embedder\.|blocks\.\d+\.attn1\.)", key) for key in keys):
        return partial(_substituted, _TRANSFORMER)
    if "decoder.mid_block.resnets.0.norm1.gamma" in keys or "encoder.mid_block.resnets.0.norm1.gamma" in keys:
        return _vae_name
    return None


def _substituted(rules: tuple[tuple[str, str], ...], key: str) -> str:
    for pattern, name in rules:
        key = re.sub(pattern, name, key)
    return key


def _vae_name(key: str) -> str:
    if block := _UP_BLOCK.match(key):
        index = _STAGE * int(block[1]) + (int(block[3]) if block[2] == "resnets" else _STAGE - 1)
        key = f"decoder.upsamples.{index}.{key[block.end() :]}"
    key = _substituted(_VAE, key)
    return _IN_RESIDUAL.sub(lambda found: f"{found[1]}.{_RESIDUAL[found[2]]}.", key)


# ---- eight bits ----

_EIGHT_BITS: Final = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES: Final = (".scale_weight", ".weight_scale")
"""ComfyUI's name and that of others, in place of `.weight`: what the stored numbers are multiplied by, one for the
matrix or one for each row."""
_BESIDE: Final = (".scale_input", ".input_scale")
"""Scales of activations, which nothing here uses: it computes in more than eight bits."""
_FORMAT: Final = ".comfy_quant"
_MARK: Final = "scaled_fp8"
"""In ComfyUI's files whose matrices all have scales."""


class LazyState(Mapping[str, Tensor]):
    """Tensors by name, each made anew whenever it is asked for."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._makers = makers

    def __getitem__(self, key: str) -> Tensor:
        return self._makers[key]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def wider(state: Mapping[str, Tensor], source: str) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
    """Tensors in eight bits as they are meant: bfloat16, which holds them exactly, or float32 where they are scaled.

    They are widened when they are asked for, since at full size they do not fit into memory beside each other.

    Returns:
        the tensors, and stand-ins of their shapes and types that take no memory.

    Raises:
        CheckpointError: a scale is missing, of no use, or of nothing.
    """
    narrow = {key for key, value in state.items() if value.dtype in _EIGHT_BITS and key != _MARK}
    scales, rest = dict[str, Tensor](), dict[str, Tensor]()
    for key, value in state.items():
        stem = key.rpartition(".")[0]
        suffix = key[len(stem) :]
        if suffix in _SCALES:
            scales[f"{stem}.weight"] = _scale(key, value, source)
        elif suffix == _FORMAT:
            _require_float8(key, value, source)
        elif suffix not in _BESIDE and key != _MARK:
            rest[key] = value
    if not narrow and not scales:
        return state, dict(state)
    if useless := sorted(scales.keys() - narrow):
        raise CheckpointError(f"{source} has a scale for {useless[0]}, which is not stored in eight bits")
    if (_MARK in state or scales) and (bare := sorted(narrow - scales.keys())):
        raise CheckpointError(
            f"{source} stores {bare[0]} in eight bits without the scale that its others have"
        )
    makers: dict[str, Callable[[], Tensor]] = {}
    described: dict[str, Tensor] = {}
    for key, value in rest.items():
        scale = scales.get(key)
        if scale is not None and scale.numel() not in (1, value.shape[0] if value.ndim else 1):
            raise CheckpointError(
                f"{source} has {scale.numel()} scales for {key} of shape {list(value.shape)}; expected one, or one "
                "for each row"
            )
        makers[key] = partial(_widened, value, scale) if key in narrow else partial(_same, value)
        wide = torch.bfloat16 if scale is None else torch.float32
        described[key] = value.new_empty((), dtype=wide).expand(value.shape) if key in narrow else value
    return LazyState(makers), described


def _same(value: Tensor) -> Tensor:
    return value


def _widened(value: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return value.to(torch.bfloat16)
    return value.to(torch.float32) * scale.reshape(-1, *[1] * (value.ndim - 1))


def _scale(key: str, value: Tensor, source: str) -> Tensor:
    if not value.is_floating_point() or not value.numel():
        raise CheckpointError(f"{source} has the scale {key} of type {value.dtype}; expected numbers")
    wide = value.detach().to(torch.float32)
    if not (torch.isfinite(wide).all() and (wide > 0).all()):
        raise CheckpointError(f"{source} has the scale {key}, which is not positive and finite throughout")
    return wide


def _require_float8(key: str, value: Tensor, source: str) -> None:
    try:
        found = json.loads(bytes(value.to(torch.uint8).tolist()))["format"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{source} has {key}, which says nothing that is understood ({error})"
        ) from error
    if found not in ("float8_e4m3fn", "float8_e5m2"):
        raise CheckpointError(
            f"{source} stores {key.removesuffix(_FORMAT)}.weight as {found!r}; expected float8, or a release in 16 bits"
        )
