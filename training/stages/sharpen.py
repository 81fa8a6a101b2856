# mypy: allow-untyped-calls, no-warn-return-any
"""The decoder's second stage: the transformer's own rollouts in, the true clips out.

What the transformer is unsure of it blurs. A caption determines its clip, so the true frames are what a rollout of that
caption should have shown, and the decoder learns which sharp shape a blurred one stands for.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightforcing_ref.config import CHUNK_FRAMES, Preset
from lightforcing_ref.dimensions import TINY_VAE
from lightforcing_ref.model import CausalWanModel
from training.config import DataConfig, StageConfig
from training.data.dataset import LATENT_FRAMES, ClipSet
from training.data.latents import PatchPCA
from training.forward import BatchRollout

from .decoder import DecoderStage, window
from .text import CaptionEncoder

__all__ = ["SharpenStage"]

ROLLOUTS = 160
"""Clips that are rolled out once, before the stage begins."""
AT_ONCE = 8
OWN = 0.7
"""Fraction of the samples that are rollouts; the others are true latents, as in the decoder's first stage."""


def rolled_out(model: CausalWanModel, text: Tensor, preset: Preset) -> Tensor:
    """Whole clips `[B, 21, 16, h, w]` for text `[B, text_len, text_dim]`."""
    height, width = preset.latent_size()
    rollout = BatchRollout(model, text, preset.token_grid())
    shape = (len(text), preset.dit.channels, CHUNK_FRAMES, height, width)
    chunks = rollout.chunks(LATENT_FRAMES // CHUNK_FRAMES, lambda: torch.randn(shape))
    return torch.cat(list(chunks), 2).transpose(1, 2)


class SharpenStage(DecoderStage):
    """The decoder stage with rollouts among its latents.

    Args:
        rollouts: how many, if there are so many clips.
    """

    name = "sharpen"

    def __init__(
        self,
        config: StageConfig,
        data: DataConfig,
        pca: PatchPCA,
        preset: Preset,
        clips: ClipSet,
        captions: CaptionEncoder,
        transformer: dict[str, Tensor],
        rollouts: int = ROLLOUTS,
    ) -> None:
        super().__init__(config, data, pca, TINY_VAE)
        model = CausalWanModel(preset.dit)
        model.load_state_dict(transformer)
        rollouts = min(rollouts, len(clips))
        chosen = clips.draw(np.random.default_rng(0), rollouts)
        self.chosen = [clips.clips[index] for index in chosen]
        parts = [self.chosen[start : start + AT_ONCE] for start in range(0, rollouts, AT_ONCE)]
        self.own = torch.cat(
            [rolled_out(model, captions([clip.caption for clip in part]), preset) for part in parts]
        )
        """`[rollouts, 21, 16, h, w]`."""

    def sample(self, generator: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        if generator.random() >= OWN:
            return super().sample(generator)
        index = int(generator.integers(len(self.chosen)))
        count, side = window(generator)
        first = int(generator.integers(LATENT_FRAMES - count + 1))
        # A window within the clip begins with a latent of four frames, of which the decoder gives one: the last.
        frames = slice(4 * first, 4 * (first + count - 1) + 1)
        return self.cropped(
            generator, self.chosen[index], frames, side, self.own[index, first : first + count]
        )
