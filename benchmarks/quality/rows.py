"""What the quality benchmark compares: rows that turn a prompt and a seed into frames.

Reference rows run the PyTorch rollout with another selection policy, by another schedule, or with block linears that
compute as fp8 or nvfp4 graphs do; bundle rows run a built bundle through the runtime, so that any execution plugs in as
`NAME=PATH`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from export import load_variant
from export.quantize import QuantPrecision, block_linears, choose_formats, fake_quantized, merge_qkv
from lightforcing_ref.cache import AttentionSpec
from lightforcing_ref.checkpoint import load_dit_state, load_umt5_state, load_vae_state
from lightforcing_ref.config import CHUNK_FRAMES, Preset
from lightforcing_ref.decoders.tae import VideoDecoder, video_decoder
from lightforcing_ref.decoders.vae import to_uint8
from lightforcing_ref.model import CausalWanModel
from lightforcing_ref.policies import PersistentSet
from lightforcing_ref.rollout import Rollout
from lightforcing_ref.schedule import FlowSchedule
from lightforcing_ref.text import build_encoder, encode_prompts, load_tokenizer
from runtime.bundle import load_bundle
from runtime.noise import fill_noise
from training.stages.decoder import use_planar_convolutions

from .policies import POLICIES, Policy

__all__ = ["SCHEDULES", "BundleRow", "ReferenceRow", "Row", "Weights", "reference_row"]

Frames = npt.NDArray[np.uint8]
LONG_WINDOW = 12
PRECISIONS: dict[str, QuantPrecision] = {"fp8": "fp8", "nvfp4": "nvfp4"}
SCHEDULES: dict[str, FlowSchedule] = {
    "2-step": FlowSchedule.warped((1000, 500)),
    "1-step": FlowSchedule.warped((1000,)),
    "framewise": load_variant("causal-framewise").schedule.resolved(),
    "framewise-2step": load_variant("causal-framewise-2step").schedule.resolved(),
    "framewise-1step": load_variant("causal-framewise-1step").schedule.resolved(),
}
"""By name: chunks of three frames in fewer steps, and the variants with chunks of one frame. Attention is dense."""


class Row(Protocol):
    """One line of the table."""

    @property
    def name(self) -> str:
        """Its name in the table."""

    @property
    def identity(self) -> str:
        """What its clips depend on, in short; clips of another identity are not taken for this row's."""

    @property
    def share(self) -> float | None:
        """The part of the keys of all frames so far that queries saw, after the first chunk; None = not known."""

    def generate(self, prompt: str, seed: int, chunks: int) -> Frames:
        """Frames uint8 `[N, H, W, 3]` of as many latent frames as `chunks` of three have."""


@dataclass(frozen=True)
class Weights:
    """The three models of a shipped folder."""

    preset: Preset
    model: CausalWanModel
    decoder: VideoDecoder
    embed: Callable[[str], Tensor]
    digest: str
    """Of all weights."""

    @classmethod
    def load(cls, folder: Path, preset: Preset, transformer: str = "dit.safetensors") -> Weights:
        """From the transformer, `vae.safetensors`, `text_encoder.safetensors` and `tokenizer.json`.

        Raises:
            CheckpointError: a file is missing or does not fit the preset.
        """
        state = load_dit_state(folder / transformer, preset.dit, dtype=torch.float32)
        model = CausalWanModel(preset.dit)
        model.load_state_dict(state)
        merge_qkv(model)
        decoder = video_decoder(preset.vae)
        decoder.load_state_dict(load_vae_state(folder / "vae.safetensors", preset.vae, dtype=torch.float32))
        use_planar_convolutions(decoder)
        umt5 = load_umt5_state(folder / "text_encoder.safetensors", preset.text, dtype=torch.float32)
        encoder = build_encoder(preset.text, umt5)
        tokenizer = load_tokenizer(folder / "tokenizer.json")

        def embed(prompt: str) -> Tensor:
            return encode_prompts(encoder, tokenizer, [prompt], preset.dit.text_len, preset.text)[0]

        digest = hashlib.sha256()
        for part in (state, decoder.state_dict(), umt5):
            for name in sorted(part):
                digest.update(name.encode() + part[name].numpy().tobytes())
        return cls(preset, model.eval(), decoder.eval(), embed, digest.hexdigest())


@dataclass(frozen=True)
class ReferenceRow:
    """The PyTorch rollout under a policy. `window_frames` as in `Rollout`.

    precision: what the linears of the blocks compute in, dynamic scales; None = float32.
    """

    name: str
    weights: Weights
    policy: Policy
    window_frames: int | None = None
    precision: QuantPrecision | None = None
    schedule: FlowSchedule = field(default_factory=FlowSchedule.warped)
    shares: list[float] = field(default_factory=list, compare=False)

    @property
    def identity(self) -> str:
        policy = self.policy
        selection = policy.selection.__name__ if policy.selection else ""
        parts = (
            *(self.weights.digest, selection, policy.hsa, policy.sparsity, policy.cag, policy.base),
            *(policy.methods, self.window_frames, self.precision, self.schedule),
            *((policy.window, policy.persistent, policy.keep) if policy.persistent else ()),
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    @property
    def share(self) -> float | None:
        return sum(self.shares) / len(self.shares) if self.shares else None

    def _quantized(self) -> AbstractContextManager[None]:
        if self.precision is None:
            return nullcontext()
        model = self.weights.model
        return fake_quantized(model, choose_formats(block_linears(model), self.precision))

    @torch.no_grad()
    def generate(self, prompt: str, seed: int, chunks: int) -> Frames:
        preset = self.weights.preset
        height, width = preset.latent_size()
        spec = AttentionSpec(
            preset.dit.heads,
            preset.geometry(),
            self.policy.hsa,
            self.policy.keep_q20(preset),
            preset.dit.head_dim**-0.5,
            persistent_frames=self.policy.persistent,
        )

        def noise(chunk: int, step: int) -> Tensor:
            out = np.empty((preset.dit.channels, self.schedule.chunk_frames, height, width), np.float32)
            fill_noise(out, seed=seed, chunk=chunk, step=step)
            return torch.from_numpy(out)

        attend = self.policy.attend(preset)
        for operator in attend:
            operator.counting = not self.shares
        rollout = Rollout(
            self.weights.model,
            spec,
            self.weights.embed(prompt),
            noise,
            preset.token_grid(),
            window_frames=self.policy.window or self.window_frames,
            persistent=PersistentSet(self.policy.persistent) if self.policy.persistent else None,
            sink_frames=1 if self.window_frames else 0,
            schedule=self.schedule,
            attend=attend,
        )
        with self._quantized():
            frames = chunks * CHUNK_FRAMES
            latents = torch.cat(list(rollout.stream(frames // self.schedule.chunk_frames)), dim=1)
        self.shares.extend(share for operator in attend for share in operator.shares)
        return np.asarray(to_uint8(self.weights.decoder.decode(latents.transpose(0, 1))).numpy())


def reference_row(name: str, weights: Weights, *, long: bool = False, label: str = "") -> ReferenceRow:
    """A row by its policy's or schedule's name, optionally with a precision: "dense", "hsa+nvfp4", "framewise".

    Args:
        long: attend within a window, as a rollout without end must.
        label: prefix of the row's name, for a second set of weights.

    Raises:
        ValueError: there is no such policy, schedule or precision.
    """
    kind, _, precision = name.partition("+")
    if kind not in POLICIES and kind not in SCHEDULES:
        known = ", ".join((*POLICIES, *SCHEDULES))
        raise ValueError(f"unknown policy or schedule {kind!r}; expected one of {known}")
    if precision not in ("", *PRECISIONS):
        raise ValueError(f"unknown precision {precision!r}; expected one of {', '.join(PRECISIONS)}")
    window = LONG_WINDOW if long else None
    return ReferenceRow(
        f"{label}{name}",
        weights,
        POLICIES.get(kind, POLICIES["dense"]),
        window,
        PRECISIONS[precision] if precision else None,
        SCHEDULES.get(kind) or FlowSchedule.warped(),
    )


class BundleRow:
    """A built bundle, run by the runtime."""

    def __init__(self, name: str, path: Path) -> None:
        from runtime import Pipeline

        self.name, self.share = name, None
        manifest = load_bundle(path).manifest  # it holds the digests of all files
        self.identity = hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()[:16]
        self.pipeline = Pipeline.load(path)

    def generate(self, prompt: str, seed: int, chunks: int) -> Frames:
        with self.pipeline.session(prompt=prompt, seed=seed) as session:
            produced = []
            for chunk in session.stream(chunks=chunks):
                produced.append(np.asarray(chunk.frames))
        return np.concatenate(produced)
