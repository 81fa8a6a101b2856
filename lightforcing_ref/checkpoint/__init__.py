"""The public checkpoints: what each must hold (`spec`), how its files are read, checked and loaded."""

from .layouts import in_pipeline
from .load import (
    SECTIONS,
    CheckpointKind,
    checkpoint_kind,
    checkpoint_sha256,
    has_linear_branch,
    load_dit_state,
    load_lora,
    load_umt5_state,
    load_vae_encoder_state,
    load_vae_state,
    merge_loras,
    vae_config_of,
)

__all__ = [
    "SECTIONS",
    "CheckpointKind",
    "checkpoint_kind",
    "checkpoint_sha256",
    "has_linear_branch",
    "in_pipeline",
    "load_dit_state",
    "load_lora",
    "load_umt5_state",
    "load_vae_encoder_state",
    "load_vae_state",
    "merge_loras",
    "vae_config_of",
]
