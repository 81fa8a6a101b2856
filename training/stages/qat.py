# mypy: allow-untyped-calls, no-warn-return-any
"""Quantization-aware finetuning: the transformer with its linears in NVFP4 learns to do what it did without.

Every prediction is compared with that of the unquantized model it started from, which gets the same noise and its own
context: rollouts of both from one seed are to agree. That is distillation (as in "quantization-aware distillation"),
so the true clips serve as beginnings of contexts only, and as the places where errors count most.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parametrize

from training.data.dataset import ClipSet
from training.quantization import quantized_twin

from .dit import REPLAYED, ROLLED_OUT, RolloutStage
from .replay import Indices, Replay

__all__ = ["QATStage"]


class _Versions(Replay):
    """A pool that holds the unquantized model's version of each clip too, in `taught`."""

    def __init__(self, clips: ClipSet, size: int, renewed: float) -> None:
        super().__init__(clips, size, renewed, blended=0.0)
        self.taught = torch.zeros_like(self.own)

    def renew(self, generator: np.random.Generator, places: Indices) -> None:
        super().renew(generator, places)
        self.taught[places] = self.own[places]


class QATStage(RolloutStage):
    """`RolloutStage` in NVFP4, with the unquantized model's predictions on its own context as targets."""

    name = "qat"
    replay: _Versions

    def extend(self) -> None:
        self.replay = _Versions(self.clips, REPLAYED * self.shown, self.weights.renewed)
        self.teacher = copy.deepcopy(self.model).requires_grad_(False)
        self.model = quantized_twin(self.model, "nvfp4")

    def roll_out(self, generator: np.random.Generator) -> None:
        places = generator.choice(self.replay.size, min(ROLLED_OUT, self.replay.size), replace=False)
        self.replay.renew(generator, places)
        with torch.random.fork_rng():
            taught = torch.cat(list(self.rolled_out(places, self.teacher)), dim=2)
        self.replay.taught[places] = taught
        self.replay.put(places, torch.cat(list(self.rolled_out(places, self.model)), dim=2))

    def loss(self, generator: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        with parametrize.cached():
            return super().loss(generator)

    def target(
        self, generator: np.random.Generator, places: Indices, latents: Tensor, text: Tensor
    ) -> Tensor:
        frames = latents.shape[2]
        taught = self.replay.taught[places, :, :frames]
        chunks = range(frames // self.chunk_frames)
        # The same draws are then made once more, for the model that is trained.
        with torch.no_grad(), torch.random.fork_rng():
            found = self.continued(copy.deepcopy(generator), chunks, taught, text, self.spec, self.teacher)
        self.replay.taught[places, :, :frames] = found
        return found
