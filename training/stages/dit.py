# mypy: allow-untyped-calls, no-warn-return-any
"""The transformer's stages: first frames, chunks after true ones, own rollouts, the same under sparse attention.

A caption determines its clip, so x0 is regressed from the data at the few-step schedule's own noise levels; there is
no teacher to distil.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightforcing_ref.cache import AttentionSpec
from lightforcing_ref.config import CHUNK_FRAMES, Preset
from lightforcing_ref.model import Block, CausalWanModel
from lightforcing_ref.rope import rope_tables
from lightforcing_ref.schedule import FlowSchedule
from lightforcing_ref.sparsity import HSAConfig, SparsityTable
from training.attention import Segment, WindowCore, forcing_layout
from training.config import LossConfig, StageConfig
from training.data.dataset import LATENT_FRAMES, ClipSet, foreground
from training.device import tensor
from training.forward import BatchRollout, predict_flow, window_core
from training.runner import Stage

from .replay import Indices, Replay
from .text import CaptionEncoder

__all__ = ["RolloutStage", "StillStage", "StudentStage", "attention_spec"]

ADAM_ONLY = ("patch_embedding", "text_embedding.0", "time_embedding.0", "head.head")
SPARSITY_TARGET, SPARSITY_BASE = 0.88, 0.98
"""Light Forcing's short configuration."""
PLACED_BY = 2
"""Blocks after which every token is to know its place."""
REPLAYED = 2
"""Clips in the pool of the model's own predictions, per clip of the largest batch."""
SHORTER = 0.5
"""Fraction of windows on own predictions that are shorter than the configured length."""
ROLLED_OUT = 8
"""Clips that are rolled out at once."""


def attention_spec(preset: Preset, table: SparsityTable, hsa: HSAConfig | None = None) -> AttentionSpec:
    """The reference's attention constants for whole clips of `preset`."""
    geometry = preset.geometry()
    totals = [geometry.k_blocks * frames for frames in range(CHUNK_FRAMES, LATENT_FRAMES + 1, CHUNK_FRAMES)]
    return AttentionSpec(
        preset.dit.heads, geometry, hsa or HSAConfig(), table.keep_q20(totals), preset.dit.head_dim**-0.5
    )


class _TransformerStage(Stage):
    """What the transformer stages share: batches of clips and the weighted loss.

    Args:
        schedule: chunks' frames and noise levels; None = four steps of three frames.
    """

    adam_only: tuple[str, ...] = ADAM_ONLY

    def __init__(
        self,
        config: StageConfig,
        loss: LossConfig,
        preset: Preset,
        clips: ClipSet,
        captions: CaptionEncoder,
        start: dict[str, Tensor] | None,
        schedule: FlowSchedule | None = None,
    ) -> None:
        self.config, self.weights, self.preset = config, loss, preset
        self.clips, self.captions = clips, captions
        self.model = CausalWanModel(preset.dit)
        self.module = self.model
        if start is None:
            start_at_identity(self.model)
        else:
            self.model.load_state_dict(start)
        self.channel_weight = tensor(clips.channel_weight)[:, None, None, None]
        self.grid = preset.token_grid()
        self.schedule = schedule or FlowSchedule.warped()
        self.chunk_frames = self.schedule.chunk_frames
        self.clip_chunks = LATENT_FRAMES // self.chunk_frames
        self.extend()

    def extend(self) -> None:
        """What a stage has besides, made when the rest is there; nothing here."""

    def batch(self, chosen: Indices, frames: int, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """`frames` latent frames from `first` on: `[B, 16, F, h, w]`, text, and loss weights `[B, 1, F, h, w]`."""
        clips = [self.clips.clips[index] for index in chosen]
        part = slice(first, first + frames)
        latents = tensor(np.stack([self.clips.latents[i][part] for i in chosen]).astype(np.float32))
        touched = tensor(foreground(np.stack([clip.path for clip in clips]))[:, part])
        weight = 1 + (self.weights.foreground - 1) * touched.float()
        return latents.transpose(1, 2), self.captions([clip.caption for clip in clips]), weight[:, None]

    def noised(
        self, generator: np.random.Generator, x0: Tensor, chunks: Sequence[int] = (0,)
    ) -> tuple[Tensor, Tensor]:
        """`x0` with a noise level of the schedule for each of `chunks`, and the level of each frame `[B, F]`."""
        drawn = []
        for chunk in chunks:
            sigmas = [self.schedule.row_sigmas[row] for row in self.schedule.rows(chunk)]
            later = len(sigmas) - 1
            odds = (
                [self.weights.full_noise, *[(1 - self.weights.full_noise) / later] * later]
                if later
                else [1.0]
            )
            drawn.append(generator.choice(sigmas, p=odds, size=len(x0)))
        sigma = tensor(np.stack(drawn, 1).astype(np.float32)).repeat_interleave(x0.shape[2] // len(chunks), 1)
        level = over_pixels(sigma)
        return (1 - level) * x0 + level * torch.randn_like(x0), sigma

    def difference(self, one: Tensor, other: Tensor) -> Tensor:
        """Squared difference of latents `[B, 16, F, h, w]` at each pixel, `[B, 1, F, h, w]`."""
        return ((one - other).square() * self.channel_weight).mean(1, keepdim=True)

    def error(self, found: Tensor, x0: Tensor, weight: Tensor) -> Tensor:
        """Weighted squared error."""
        return (self.difference(found, x0) * weight).sum() / weight.sum()

    def continued(
        self,
        generator: np.random.Generator,
        chunks: range,
        own: Tensor,
        text: Tensor,
        spec: AttentionSpec | None = None,
        model: CausalWanModel | None = None,
    ) -> Tensor:
        """x0 predicted for noised chunks, each seeing the chunks before it, as in a rollout.

        Args:
            chunks: the window; the first one is predicted only if it is chunk 0.
            own: the window's latents, from which context and noised chunks are made.
            model: who predicts; None = the one that is trained.

        Returns:
            the predicted chunks, which are the window's last ones.
        """
        model = model or self.model
        layout = forcing_layout(chunks)
        noisy = [segment.chunk for segment in layout[len(chunks) - 1 :]]
        targets = len(noisy) * self.chunk_frames
        context = own[:, :, : -self.chunk_frames]
        context = context + self.weights.context_noise * torch.randn_like(context)
        x, sigma = self.noised(generator, own[:, :, -targets:], noisy)
        t = torch.cat([torch.zeros(context.shape[0], context.shape[2]), sigma], dim=1)
        core = window_core(model, layout, self.grid, spec, self.chunk_frames)
        both = torch.cat([context, x], dim=2)
        flow = predict_flow(model, both, 1000 * t, model.embed_text(text), core)
        return x - over_pixels(sigma) * flow[:, :, -targets:]

    @property
    def shown(self) -> int:
        """Chunks that a step on windows computes, however long they are."""
        return 2 * (self.config.chunks - 1) * self.config.batch

    def fitting(self, chunks: int) -> int:
        """How many windows of `chunks` fit into a step: the shorter, the more."""
        return self.shown // (2 * (chunks - 1))


def start_at_identity(model: CausalWanModel) -> None:
    """Let an untrained model's flow be its input, which at full noise is right but for the clip itself.

    Blocks add nothing at first, and the head inverts the patch embedding.
    """
    with torch.no_grad():
        embedding = model.patch_embedding.weight
        dim, inputs = embedding.shape[0], embedding[0].numel()
        torch.nn.init.orthogonal_(embedding.view(dim, inputs))
        cast(Tensor, model.patch_embedding.bias).zero_()
        # The head's layer norm scales the embedded latents, of unit variance in `inputs` of `dim` directions.
        inverse = embedding.view(dim, -1, *model.config.patch).permute(2, 3, 4, 1, 0).reshape(inputs, dim)
        model.head.head.weight.copy_(inverse * (inputs / dim) ** 0.5)
        model.head.head.bias.zero_()
        model.head.modulation.zero_()
        for layer in model.blocks:
            block = cast(Block, layer)
            for output in (block.self_attn.o, block.cross_attn.o, cast(nn.Linear, block.ffn[2])):
                output.weight.zero_()
                output.bias.zero_()


def over_pixels(values: Tensor) -> Tensor:
    """`[B, F]` to `[B, 1, F, 1, 1]`."""
    return values[:, None, :, None, None].float()


class _PlacedStage(_TransformerStage):
    """A stage that draws the first frames of clips, and in which every token learns where it is.

    The model has no positions but relative ones, and attention over tokens that are all noise averages to the same
    everywhere. A token can tell its place only from how its surroundings end at the picture's border. That is hard
    to find by drawing and easy to find if asked for: row, column and frame are read out linearly after a few blocks.
    """

    adam_only = (*(f"model.{name}" for name in ADAM_ONLY), "readout")
    handed_on = "model."

    def extend(self) -> None:
        self.sizes = (self.chunk_frames, *self.grid)
        self.readout = nn.Linear(self.preset.dit.dim, sum(self.sizes))
        nn.init.zeros_(
            self.readout.weight
        )  # what the model can do already is not disturbed by a random readout
        self.module = nn.ModuleDict({"model": self.model, "readout": self.readout})

    def alone(
        self, generator: np.random.Generator, size: int, frames: int
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss of the first `frames` frames (at most a chunk) of `size` clips."""
        latents, text, weight = self.batch(self.clips.draw(generator, size), frames)
        x, sigma = self.noised(generator, latents)
        dit = self.preset.dit
        cos, sin = rope_tables(torch.arange(frames), self.grid, dit.head_dim, theta=dit.rope_theta)
        core = WindowCore([Segment(0, ())], dit.heads, cos, sin)
        placed: list[Tensor] = []

        def watch(layer: int, tokens: Tensor) -> None:
            if layer + 1 == PLACED_BY:
                placed.append(self.readout(tokens.flatten(1, 2)))

        flow = predict_flow(self.model, x, 1000 * sigma, self.model.embed_text(text), core, watch)
        drawn = self.error(x - over_pixels(sigma) * flow, latents, weight)
        axes = torch.meshgrid(*(torch.arange(n) for n in (frames, *self.grid)), indexing="ij")
        lost, right = torch.zeros(()), 1.0
        for logits, axis in zip(placed[0].split(self.sizes, dim=-1), axes, strict=True):
            wanted = axis.flatten().expand(logits.shape[:2])
            lost = lost + F.cross_entropy(logits.transpose(1, 2), wanted)
            right = min(right, float((logits.argmax(-1) == wanted).float().mean()))
        return drawn + self.weights.place * lost, {"drawn": drawn.item(), "placed": right}


class StillStage(_PlacedStage):
    """The first frame only, as many different ones as fit into a step: what drawing is learnt from fastest."""

    name = "still"

    def loss(self, generator: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        return self.alone(generator, self.config.batch, 1)


class StudentStage(_PlacedStage):
    """Chunks after true ones, mixed with steps that draw the first chunk alone, of more clips."""

    name = "student"

    def loss(self, generator: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        if generator.random() < self.weights.first_window:
            return self.alone(generator, self.shown, self.chunk_frames)
        count = int(generator.integers(2, self.config.chunks + 1))
        first = int(generator.integers(self.clip_chunks - count + 1))
        chunks = range(first, first + count)
        chosen = self.clips.draw(generator, self.fitting(count))
        latents, text, weight = self.batch(chosen, count * self.chunk_frames, first * self.chunk_frames)
        found = self.continued(generator, chunks, latents, text)
        frames = found.shape[2]
        drawn = self.error(found, latents[:, :, -frames:], weight[:, :, -frames:])
        return drawn, {"drawn": drawn.item(), "placed": float("nan")}


class RolloutStage(_TransformerStage):
    """The student on its own predictions (`Replay`), the true clip as target.

    Windows begin with the clip: positions are relative, and a context that is wrong does not tell what time it is.
    With `spec` the same under sparse attention.
    """

    name = "rollout"
    spec: AttentionSpec | None = None

    def extend(self) -> None:
        self.replay = Replay(self.clips, REPLAYED * self.shown, self.weights.renewed, self.weights.blended)

    def roll_out(self, generator: np.random.Generator) -> None:
        """Put whole rollouts of new clips into the pool."""
        places = generator.choice(self.replay.size, min(ROLLED_OUT, self.replay.size), replace=False)
        self.replay.renew(generator, places)
        for index, chunk in enumerate(self.rolled_out(places, self.model)):
            self.replay.put(places, chunk, index * self.chunk_frames)

    def rolled_out(self, places: Indices, model: CausalWanModel) -> Iterator[Tensor]:
        """The chunks of whole rollouts of the clips in `places`."""
        captions = [self.clips.clips[index].caption for index in self.replay.members[places]]
        rollout = BatchRollout(model, self.captions(captions), self.grid, self.spec, self.schedule)
        alike = self.replay.own[places, :, : self.chunk_frames]
        return rollout.chunks(self.clip_chunks, lambda: torch.randn_like(alike))

    def loss(self, generator: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        count, size = 1, self.shown
        if generator.random() >= self.weights.first_window:
            count = self.config.chunks
            if generator.random() < SHORTER:
                count = int(generator.integers(2, count + 1))
            size = self.fitting(count)
        # A rollout of shorter chunks takes as many more forwards.
        if generator.random() < self.weights.own_rollouts * self.chunk_frames / CHUNK_FRAMES:
            self.roll_out(generator)
        places = self.replay.draw(generator, size)
        frames = count * self.chunk_frames
        latents, text, weight = self.batch(self.replay.members[places], frames)
        rivals = self.replay.rivals(generator, places, frames)
        weight = weight + self.weights.outline * self.difference(rivals, latents)
        own = self.replay.own[places, :, :frames]
        target = self.target(generator, places, latents, text)
        found = self.continued(generator, range(count), own, text, self.spec)
        drawn = self.error(found, target, weight)
        self.replay.put(places, found)
        return drawn, {"chunks": float(count), "drift": float((own - latents).square().mean())}

    def target(
        self, generator: np.random.Generator, places: Indices, latents: Tensor, text: Tensor
    ) -> Tensor:
        """What the clips in `places` should become, in the shape of their true `latents`; those themselves."""
        return latents
