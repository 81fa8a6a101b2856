# mypy: allow-untyped-calls, no-warn-return-any
"""The text stage: the byte-level encoder learns to read captions before the transformer has to.

Every token's output must tell every field of the caption, so that whatever the transformer's cross-attention averages
over holds what it needs. The readout heads are dropped afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightforcing_ref.config import Preset
from lightforcing_ref.text import (
    build_encoder,
    byte_tokenizer,
    encode_prompts,
    encoder_weights,
    tokenize,
    umt5_keys,
)
from training.config import StageConfig
from training.data.clips import COLOURS, GROUNDS, KINDS, MOTIONS, SHAPES, Clip, random_clip
from training.device import load_weights
from training.runner import Stage

__all__ = ["FIELDS", "CaptionEncoder", "TextStage", "fields_of"]

FIELDS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "ground": tuple(GROUNDS),
    "kind": KINDS,
    "direction": tuple(sorted({motion.direction for motion in MOTIONS})),
    "place": tuple(sorted({motion.place for motion in MOTIONS})),
}


def fields_of(clip: Clip) -> list[int]:
    """The caption's fields as class indices, in the order of `FIELDS`."""
    motion = clip.motion
    values = (clip.colour, clip.shape, clip.ground, motion.kind, motion.direction, motion.place)
    return [classes.index(value) for classes, value in zip(FIELDS.values(), values, strict=True)]


class TextStage(Stage):
    """Cross-entropy of each field, read linearly from each token."""

    name = "text"
    adam_only = ("encoder.shared", "encoder.encoder.embed_tokens", "readout")

    def __init__(self, config: StageConfig, preset: Preset, seed: int) -> None:
        self.config, self.preset = config, preset
        self.tokenizer = byte_tokenizer()
        self.encoder = build_encoder(preset.text, seed=seed)
        self.readout = nn.Linear(preset.text.d_model, sum(len(classes) for classes in FIELDS.values()))
        self.module = nn.ModuleDict({"encoder": self.encoder, "readout": self.readout})
        self.module.train()

    def loss(self, generator: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        clips = [random_clip(generator, KINDS) for _ in range(self.config.batch)]
        length = self.preset.dit.text_len
        tokens = [tokenize(self.tokenizer, clip.caption, length, self.preset.text) for clip in clips]
        ids, mask = (torch.stack(parts) for parts in zip(*tokens, strict=True))
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        logits = self.readout(hidden).split([len(classes) for classes in FIELDS.values()], dim=-1)
        targets = torch.tensor([fields_of(clip) for clip in clips])
        total, right = torch.zeros(()), 1.0
        for index, field in enumerate(logits):
            wanted = targets[:, index, None].expand(field.shape[:2])
            losses = F.cross_entropy(field.transpose(1, 2), wanted, reduction="none")
            total = total + (losses * mask).sum() / mask.sum()
            right = min(right, float(((field.argmax(-1) == wanted) * mask).sum() / mask.sum()))
        return total, {"worst_field": right}


class CaptionEncoder:
    """Embeddings of captions by the trained encoder, remembered.

    Args:
        state: the text stage's weights.
    """

    def __init__(self, preset: Preset, state: dict[str, Tensor]) -> None:
        own = {key.name: state[f"encoder.{key.hf}"].detach().clone() for key in umt5_keys(preset.text.layers)}
        self.preset = preset
        self.model = build_encoder(preset.text, own)
        self.tokenizer = byte_tokenizer()
        self._known: dict[str, Tensor] = {}

    @classmethod
    def load(cls, preset: Preset, path: Path) -> CaptionEncoder:
        """From the text stage's weights file."""
        return cls(preset, load_weights(path))

    @property
    def weights(self) -> dict[str, Tensor]:
        """The encoder's weights under the project's names."""
        return encoder_weights(self.model)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """`[B, text_len, text_dim]`, zero past each caption's length."""
        for caption in captions:
            if caption not in self._known:
                found = encode_prompts(
                    self.model, self.tokenizer, [caption], self.preset.dit.text_len, self.preset.text
                )
                self._known[caption] = found[0]
        return torch.stack([self._known[caption] for caption in captions])
