"""How strongly a LoRA counts: alpha and rank, wherever its file or the file beside it states them.

PEFT adds `alpha / r B A` (`alpha / sqrt(r)` with rsLoRA), alpha being in `adapter_config.json`; Kohya's scripts keep it
in the metadata of the safetensors file or in a tensor `<matrix>.alpha`; training scripts in a mapping `lora_config`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightforcing_ref.errors import CheckpointError

from .files import checkpoint_files, checkpoint_sha256

__all__ = ["LoRAScale", "MergedLoRA", "lora_scale", "lora_sha256"]

_CONFIG_NAME = "adapter_config.json"
_CONFIG_BYTES = 1 << 20
_ALPHA = ("lora_alpha", "alpha", "ss_network_alpha", "network_alpha")
_RANK = ("r", "rank", "lora_rank", "ss_network_dim", "network_dim")
_PLAIN: dict[str, tuple[object, ...]] = {
    "peft_type": (None, "LORA"),
    "use_dora": (None, False),
    "fan_in_fan_out": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "modules_to_save": (None, []),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "layers_to_transform": (None, []),
}
"""Settings that would change what a LoRA does, with the values at which they do not."""


@dataclass(frozen=True)
class MergedLoRA:
    """A LoRA to merge, and how strongly, on top of the scale that it states itself."""

    path: str | Path
    strength: float = 1.0


@dataclass(frozen=True)
class LoRAScale:
    """Alpha as stated, None where nothing states it (then the scale is 1, as LongLive trains), and its division."""

    alpha: float | None = None
    rank: int | None = None
    rs: bool = False
    source: str = ""

    def of(self, rank: int) -> float:
        """What `B A` of so many ranks is multiplied by.

        Raises:
            CheckpointError: another rank was stated.
        """
        if self.rank is not None and self.rank != rank:
            raise CheckpointError(
                f"{self.source} states rank {self.rank}, and the LoRA's matrices have rank {rank}; the files belong "
                "to different LoRAs"
            )
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(rank) if self.rs else rank)


def lora_scale(path: str | Path, content: Mapping[str, Any]) -> LoRAScale:
    """The scale that belongs to the LoRA at `path`, whose file holds `content`.

    Raises:
        CheckpointError: two places state different scales, one is not readable, or states what is not supported.
    """
    file = checkpoint_files(path)[0]
    stated = [
        _read(where, settings)
        for where, settings in (
            (f"{file.parent / _CONFIG_NAME}", _adapter_config(file)),
            (f"the metadata of {file}", _metadata(file)),
            (f"`lora_config` in {file}", content.get("lora_config")),
        )
        if isinstance(settings, Mapping)
    ]
    stated = [scale for scale in stated if scale.alpha is not None or scale.rank is not None]
    for other in stated[1:]:
        if (other.alpha, other.rs) != (stated[0].alpha, stated[0].rs):
            raise CheckpointError(
                f"{stated[0].source} states alpha {stated[0].alpha} and {other.source} alpha {other.alpha}; remove "
                "the one that does not belong to this LoRA"
            )
    return stated[0] if stated else LoRAScale()


def lora_sha256(path: str | Path) -> str:
    r"""Identify a LoRA, in hexadecimal: its checkpoint's SHA-256, or where `adapter_config.json` counts, the SHA-256 of
    the lines `<sha256>  <name>\\n` of both.
    """
    digest = checkpoint_sha256(path)
    file = checkpoint_files(path)[0]
    config = _config_path(file)
    if config is None:
        return digest
    lines = f"{digest}  {file.name}\n{hashlib.sha256(config.read_bytes()).hexdigest()}  {config.name}\n"
    return hashlib.sha256(lines.encode()).hexdigest()


def _read(source: str, settings: Mapping[str, Any]) -> LoRAScale:
    for name, plain in _PLAIN.items():
        if name in settings and settings[name] not in plain:
            raise CheckpointError(
                f"{source} states {name} = {settings[name]!r}, which is not supported; merge this LoRA with the tool "
                "that made it, and pass the result as --checkpoint"
            )
    alpha = _number(source, settings, _ALPHA)
    rank = _number(source, settings, _RANK)
    if rank is not None and (rank < 1 or rank != int(rank)):
        raise CheckpointError(f"{source} states rank {rank}; expected a whole number, 1 or more")
    rs = bool(settings.get("use_rslora"))
    return LoRAScale(alpha, None if rank is None else int(rank), rs, source)


def _number(source: str, settings: Mapping[str, Any], names: tuple[str, ...]) -> float | None:
    for name in names:
        if settings.get(name) in (None, "None", "Dynamic"):
            continue
        try:
            value = float(settings[name])
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise CheckpointError(f"{source} states {name} = {settings[name]!r}; expected a finite number")
        return value
    return None


def _config_path(file: Path) -> Path | None:
    """Where PEFT's settings of this file are; other files of a folder are no business of its config."""
    path = file.parent / _CONFIG_NAME
    return path if path.is_file() and file.name.startswith("adapter_model") else None


def _adapter_config(file: Path) -> Mapping[str, Any] | None:
    path = _config_path(file)
    if path is None:
        return None
    with path.open("rb") as opened:
        return _json_object(path, opened.read(_CONFIG_BYTES + 1))


def _json_object(path: Path, text: bytes) -> Mapping[str, Any]:
    try:
        if len(text) > _CONFIG_BYTES:
            raise ValueError(f"it has more than {_CONFIG_BYTES} bytes")
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no readable JSON ({error}); fetch it again") from error
    if not isinstance(settings, dict):
        raise CheckpointError(
            f"{path} holds a {type(settings).__name__}; expected the settings of a PEFT LoRA"
        )
    return settings


def _metadata(file: Path) -> Mapping[str, str] | None:
    if file.suffix != ".safetensors":
        return None
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        metadata: Mapping[str, str] | None = opened.metadata()
    if metadata is None or "lora_adapter_metadata" not in metadata:  # Diffusers: PEFT's settings as JSON
        return metadata
    settings = _json_object(file, metadata["lora_adapter_metadata"].encode())
    return {str(key).removeprefix("transformer."): value for key, value in settings.items()}
