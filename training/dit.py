"""The transformer's stages: teacher, student on the teacher's trajectories, own rollouts, sparse attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from lightforcing_ref.cache import AttentionSpec
from lightforcing_ref.config import CHUNK_FRAMES, Preset
from lightforcing_ref.model import Block, CausalWanModel
from lightforcing_ref.schedule import FlowSchedule
from lightforcing_ref.sparsity import HSAConfig, SparsityTable

from .attention import causal_layout, forcing_layout
from .config import LossConfig, StageConfig
from .data import Clip
from .dataset import LATENT_FRAMES, ClipSet, foreground
from .device import tensor
from .forward import BatchRollout, euler_sigmas, predict_flow, window_core
from .runner import Stage
from .text import CaptionEncoder

__all__ = ["PairSet", "RolloutStage", "StudentStage", "TeacherStage", "attention_spec", "build_pairs"]

CLIP_CHUNKS = LATENT_FRAMES // CHUNK_FRAMES
SHIFT = 5.0
ADAM_ONLY = ("patch_embedding", "text_embedding.0", "time_embedding.0", "head.head")
SPARSITY_TARGET, SPARSITY_BASE = 0.88, 0.98
"""Light Forcing's short configuration."""


def attention_spec(preset: Preset, table: SparsityTable, hsa: HSAConfig | None = None) -> AttentionSpec:
    """The reference's attention constants for whole clips of `preset`."""
    geometry = preset.geometry()
    totals = [geometry.k_blocks * frames for frames in range(CHUNK_FRAMES, LATENT_FRAMES + 1, CHUNK_FRAMES)]
    return AttentionSpec(
        preset.dit.heads, geometry, hsa or HSAConfig(), table.keep_q20(totals), preset.dit.head_dim**-0.5
    )


class _TransformerStage(Stage):
    """What the transformer stages share: batches of windows and the weighted loss."""

    adam_only = ADAM_ONLY
    module: CausalWanModel

    def __init__(
        self,
        config: StageConfig,
        loss: LossConfig,
        preset: Preset,
        clips: ClipSet,
        captions: CaptionEncoder,
        start: dict[str, Tensor] | None,
    ) -> None:
        self.config, self.weights, self.preset, self.clips, self.captions = (
            config,
            loss,
            preset,
            clips,
            captions,
        )
        self.module = CausalWanModel(preset.dit)
        if start is None:
            start_at_identity(self.module)
        else:
            self.module.load_state_dict(start)
        self.channel_weight = tensor(clips.channel_weight)[:, None, None, None]
        height, width = preset.latent_size()
        self.grid = (height // preset.dit.patch[1], width // preset.dit.patch[2])

    def window(self, generator: np.random.Generator) -> tuple[int, int]:
        """First chunk and number of chunks of a training window."""
        count = self.config.chunks
        if generator.random() < self.weights.first_window or count >= CLIP_CHUNKS:
            return 0, count
        return int(generator.integers(1, CLIP_CHUNKS - count + 1)), count

    def batch(self, generator: np.random.Generator, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents `[B, 16, F, h, w]`, text, and loss weights `[B, 1, F, h, w]`."""
        chosen = generator.integers(len(self.clips), size=self.config.batch)
        frames = slice(first * CHUNK_FRAMES, (first + count) * CHUNK_FRAMES)
        clips = [self.clips.clips[index] for index in chosen]
        latents = tensor(np.stack([self.clips.latents[i][frames] for i in chosen]).astype(np.float32))
        return (
            latents.transpose(1, 2),
            self.captions([clip.caption for clip in clips]),
            self.weight(clips, frames),
        )

    def error(self, found: Tensor, wanted: Tensor) -> Tensor:
        """Squared error over the channels, `[B, 1, F, h, w]`."""
        return ((found - wanted).square() * self.channel_weight).mean(1, keepdim=True)

    def weight(self, clips: list[Clip], frames: slice) -> Tensor:
        """Loss weight of each latent pixel, `[B, 1, F, h, w]`."""
        touched = tensor(foreground(np.stack([clip.path for clip in clips]))[:, frames])
        return (1 + (self.weights.foreground - 1) * touched.float())[:, None]


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


def per_frame(values: Tensor) -> Tensor:
    """`[B, chunks]` to `[B, 1, frames, 1, 1]`."""
    return values.repeat_interleave(CHUNK_FRAMES, 1)[:, None, :, None, None].float()


class TeacherStage(_TransformerStage):
    """Flow matching with a noise level of its own for every chunk; part of the context is clean."""

    name = "teacher"

    def loss(self, generator: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        first, count = self.window(generator)
        latents, text, weight = self.batch(generator, first, count)
        uniform = tensor(generator.random((len(latents), count)))
        sigma = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
        clean = tensor(generator.random((len(latents), count)) < self.weights.clean_context)
        clean[:, -1] = False
        # The past of a later window is missing, so its first chunk cannot be predicted.
        clean[:, 0] |= first > 0
        sigma = torch.where(clean, 0.0, sigma)
        noise = torch.randn_like(latents)
        level = per_frame(sigma)
        context = latents + self.weights.context_noise * torch.randn_like(latents)
        noisy = torch.where(per_frame(clean) > 0, context, (1 - level) * latents + level * noise)
        core = window_core(self.module, causal_layout(range(first, first + count)), self.grid)
        cross = self.module.embed_text(text)
        t = 1000 * sigma.repeat_interleave(CHUNK_FRAMES, 1)
        flow = predict_flow(self.module, noisy, t, cross, core)
        weight = weight * (1 - per_frame(clean))
        error = self.error(flow, noise - latents)
        start = float((error[:, :, :CHUNK_FRAMES] * weight[:, :, :CHUNK_FRAMES]).sum().detach())
        start /= max(float(weight[:, :, :CHUNK_FRAMES].sum()), 1.0)
        plain = (
            (flow.detach() - (noise - latents)).square().mean(1, keepdim=True) * weight
        ).sum() / weight.sum()
        figures = {"first": float(first), "first_chunk": start, "plain": float(plain)}
        return (error * weight).sum() / weight.sum(), figures


class PairSet:
    """Teacher trajectories: states at the student's four noise levels and the clean end, float16.

    `states` `[N, 5, 21, 16, 16, 16]`: noise, three states on the way, x0; frames before channels.
    """

    def __init__(self, folder: Path) -> None:
        with np.load(folder / "pairs.npz") as content:
            self.states = content["states"]
            self.rows = content["rows"]


def build_pairs(
    stage: _TransformerStage,
    folder: Path,
    *,
    count: int,
    batch: int,
    euler_steps: int,
    seed: int,
    report: Callable[[str, float], None] | None = None,
) -> None:
    """Run the teacher's ODE for `count` captions of the training set, chunk by chunk on its own output.

    Parts are written as they are finished and joined at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    levels = FlowSchedule.warped().sigmas
    height, width = stage.preset.latent_size()
    parts = []
    for start in range(0, count, batch):
        part = folder / f"part-{start}-{batch}.npz"
        parts.append(part)
        if not part.exists():
            generator = torch.Generator("cpu").manual_seed(seed * 1_000_003 + start)
            rows = [index % len(stage.clips) for index in range(start, min(start + batch, count))]
            text = stage.captions([stage.clips.clips[row].caption for row in rows])
            rollout = BatchRollout(stage.module, text, stage.grid)
            chunks = []
            for _ in range(CLIP_CHUNKS):
                shape = (len(rows), stage.preset.dit.channels, CHUNK_FRAMES, height, width)
                x0, states = rollout.euler(
                    torch.randn(shape, generator=generator, device="cpu").to(text.device),
                    euler_sigmas(euler_steps),
                    levels[:-1],
                )
                rollout.commit(x0)
                chunks.append(torch.stack([*states, x0], dim=1))
            clips = torch.cat(chunks, dim=3).transpose(2, 3).half().cpu().numpy()
            partial = part.with_name(f"partial-{part.name}")
            np.savez(partial, states=clips, rows=np.array(rows))
            partial.replace(part)
        if report is not None:
            report(f"{min(start + batch, count)} trajectories", min(start + batch, count) / count)
    loaded = [dict(np.load(part)) for part in parts]
    joined = {key: np.concatenate([content[key] for content in loaded]) for key in ("states", "rows")}
    np.savez(folder / "pairs.npz", states=joined["states"], rows=joined["rows"])
    for part in parts:
        part.unlink()


class StudentStage(_TransformerStage):
    """Regression of the teacher's x0 from its states at the four noise levels."""

    name = "student"
    pairs: PairSet

    def loss(self, generator: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        first, count = self.window(generator)
        chosen = generator.integers(len(self.pairs.rows), size=self.config.batch)
        clips = [self.clips.clips[int(self.pairs.rows[index])] for index in chosen]
        frames = slice(first * CHUNK_FRAMES, (first + count) * CHUNK_FRAMES)
        states = tensor(np.stack([self.pairs.states[i][:, frames] for i in chosen]).astype(np.float32))
        states = states.transpose(2, 3)
        x0 = states[:, -1]
        schedule = FlowSchedule.warped()
        steps = tensor(generator.integers(schedule.denoise_steps, size=(len(chosen), count)))
        clean = tensor(generator.random((len(chosen), count)) < self.weights.clean_context)
        clean[:, -1] = False
        clean[:, 0] |= first > 0
        steps = torch.where(clean, schedule.clean_step, steps)
        index = per_frame(steps).long().expand_as(x0)[:, None]
        x = states.gather(1, index)[:, 0]
        x = x + per_frame(clean) * self.weights.context_noise * torch.randn_like(x)
        sigma = torch.tensor(schedule.sigmas)[steps]
        core = window_core(self.module, causal_layout(range(first, first + count)), self.grid)
        cross = self.module.embed_text(self.captions([clip.caption for clip in clips]))
        flow = predict_flow(self.module, x, 1000 * sigma.repeat_interleave(CHUNK_FRAMES, 1), cross, core)
        weight = self.weight(clips, frames) * (1 - per_frame(clean))
        error = self.error(x - per_frame(sigma) * flow, x0)
        return (error * weight).sum() / weight.sum(), {"first": float(first)}


class RolloutStage(_TransformerStage):
    """The student on its own output: true first chunk, own later ones as context, true clip as target.

    With `spec` the same under sparse attention, in the rollout as in the loss.
    """

    name = "rollout"
    spec: AttentionSpec | None = None

    def loss(self, generator: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        count = self.config.chunks
        latents, text, weight = self.batch(generator, 0, count)
        rollout = BatchRollout(self.module, text, self.grid, self.spec)
        own = [
            latents[:, :, :CHUNK_FRAMES]
        ]  # its jitter is the clip's, so the clip is the target of what follows
        for _ in range(count - 1):
            rollout.commit(own[-1])
            own.append(rollout.few_steps(lambda: torch.randn_like(own[0])))
        schedule = FlowSchedule.warped()
        steps = tensor(generator.integers(schedule.denoise_steps, size=(len(latents), count)))
        sigma = torch.tensor(schedule.sigmas)[steps]
        level = per_frame(sigma)
        noisy = (1 - level) * latents + level * torch.randn_like(latents)
        x = torch.cat([*own, noisy], dim=2)
        t = torch.cat([torch.zeros_like(sigma), sigma], dim=1).repeat_interleave(CHUNK_FRAMES, 1)
        core = window_core(self.module, forcing_layout(range(count)), self.grid, self.spec)
        flow = predict_flow(self.module, x, 1000 * t, self.module.embed_text(text), core)
        x0 = noisy - level * flow[:, :, count * CHUNK_FRAMES :]
        error = self.error(x0, latents)
        drift = (torch.cat(own, 2) - latents)[:, :, CHUNK_FRAMES:].square().mean()
        return (error * weight).sum() / weight.sum(), {"drift": float(drift)}
