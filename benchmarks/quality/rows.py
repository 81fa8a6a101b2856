"""What the quality benchmark compares: rows that turn a prompt and a seed into frames.

Reference rows run the PyTorch rollout with another selection policy, or with block linears that compute as fp8 or
nvfp4 graphs do; bundle rows run a built bundle through the runtime, so that any execution plugs in as `NAME=PATH`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from export.quantize import QuantPrecision, block_linears, choose_formats, fake_quantized, merge_qkv
from lightforcing_ref.attention import dense_attention, hsa_attention
from lightforcing_ref.cache import AttentionSpec
from lightforcing_ref.checkpoint import load_dit_state, load_umt5_state, load_vae_state
from lightforcing_ref.config import CHUNK_FRAMES, Preset
from lightforcing_ref.decoders.tae import VideoDecoder, video_decoder
from lightforcing_ref.decoders.vae import to_uint8
from lightforcing_ref.model import CausalWanModel
from lightforcing_ref.policies import Policy as Method
from lightforcing_ref.policies import PolicyAttention, Radial, SlidingTile, SpargeAttention, VMoBA
from lightforcing_ref.rollout import Rollout
from lightforcing_ref.sparsity import HSAConfig, SparsityTable, kept_blocks
from lightforcing_ref.text import build_encoder, encode_prompts, load_tokenizer
from runtime.noise import fill_noise
from training.stages.decoder import use_planar_convolutions

__all__ = ["POLICIES", "BundleRow", "Policy", "ReferenceRow", "Row", "Weights", "reference_row"]

Frames = npt.NDArray[np.uint8]
Selection = Callable[..., Tensor]
"""(q_mean, k_mean, past_frames, chunk, hsa, keep_q20) -> bool `[H, query blocks, key blocks]`."""

SPARSITY_TARGET, SPARSITY_BASE = 0.88, 0.98
"""Light Forcing's short configuration."""
MILD_TARGET, MILD_BASE = 0.80, 0.90
"""Its milder one, for larger blocks; a block of 32 tokens is half a frame here."""
TABLE_FRAMES = 21
LONG_WINDOW = 12
PRECISIONS: dict[str, QuantPrecision] = {"fp8": "fp8", "nvfp4": "nvfp4"}
EVERY_FRAME = 1 << 20
"""As `keep_frames`: more than there ever are, so that selection has one stage."""


class Row(Protocol):
    """One line of the table."""

    @property
    def name(self) -> str:
        """Its name in the table."""

    def generate(self, prompt: str, seed: int, chunks: int) -> Frames:
        """Frames uint8 `[N, H, W, 3]`."""


@dataclass(frozen=True)
class Weights:
    """The three models of a shipped folder."""

    preset: Preset
    model: CausalWanModel
    decoder: VideoDecoder
    embed: Callable[[str], Tensor]

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

        return cls(preset, model.eval(), decoder.eval(), embed)


@dataclass(frozen=True)
class Policy:
    """Which key blocks a query block sees.

    `cag`: whether the budget grows with the history as in Light Forcing; else every chunk after the first has the
    same sparsity, with the same average over all key-value work.
    """

    name: str
    selection: Selection | None
    """None: Light Forcing's own operator."""
    hsa: HSAConfig
    sparsity: float | None
    cag: bool = True
    base: float = SPARSITY_BASE
    """With CAG, the sparsity in the limit of a long history."""
    methods: tuple[Method, ...] = ()
    """Another method of the field in its place; where there are several, layers take them in turn."""

    def attend(self, preset: Preset) -> list[Callable[..., Tensor]]:
        """The attention operator of every layer."""
        if self.methods:
            turns = [PolicyAttention(method, preset.token_grid()) for method in self.methods]
            return [turns[layer % len(turns)] for layer in range(preset.dit.layers)]
        operator = hsa_attention if self.selection is None else _attend_with(self.selection)
        return [operator] * preset.dit.layers

    def keep_q20(self, preset: Preset) -> tuple[int, ...]:
        totals = [
            preset.geometry().k_blocks * frames
            for frames in range(CHUNK_FRAMES, TABLE_FRAMES + 1, CHUNK_FRAMES)
        ]
        if self.sparsity is None:
            return SparsityTable.dense().keep_q20(totals)
        base = self.base if self.cag else self.sparsity
        return SparsityTable.chunk_aware(self.sparsity, base, table_frames=TABLE_FRAMES).keep_q20(totals)


def _nearest(
    q_mean: Tensor, k_mean: Tensor, past: int, chunk: int, _: HSAConfig, keep: Sequence[int]
) -> Tensor:
    """The most recent blocks, whatever they hold: a sliding window."""
    total = k_mean.shape[0] * k_mean.shape[1]
    seen = torch.arange(total) >= total - kept_blocks(keep, chunk, total)
    return seen.expand(q_mean.shape[2], q_mean.shape[0] * q_mean.shape[1], total)


def _random(
    q_mean: Tensor, k_mean: Tensor, past: int, chunk: int, _: HSAConfig, keep: Sequence[int]
) -> Tensor:
    """Blocks drawn at random, the same ones for every head and query block: what a budget alone is worth."""
    total = k_mean.shape[0] * k_mean.shape[1]
    generator = torch.Generator().manual_seed(chunk)
    chosen = torch.randperm(total, generator=generator)[: kept_blocks(keep, chunk, total)]
    seen = torch.zeros(total, dtype=torch.bool).index_fill(0, chosen, True)
    return seen.expand(q_mean.shape[2], q_mean.shape[0] * q_mean.shape[1], total)


_VMOBA = tuple(VMoBA(block) for block in ((1, None, None), (None, 2, 4), (2, 4, 4)))
"""Blocks in time, in space, and in both, for the 8 x 8 tokens of the tiny model's frames."""
_HSA = HSAConfig()
_ONE_STAGE = HSAConfig(keep_frames=EVERY_FRAME, sink_frames=0, near_frames=0)
POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy("dense", None, _HSA, None),
        Policy("hsa", None, _HSA, SPARSITY_TARGET),
        Policy("hsa-80", None, _HSA, MILD_TARGET, base=MILD_BASE),
        Policy("hsa-uniform", None, _HSA, SPARSITY_TARGET, cag=False),
        Policy("top-k", None, _ONE_STAGE, SPARSITY_TARGET),
        Policy("top-k-uniform", None, _ONE_STAGE, SPARSITY_TARGET, cag=False),
        Policy("nearest", _nearest, _HSA, SPARSITY_TARGET),
        Policy("nearest-uniform", _nearest, _HSA, SPARSITY_TARGET, cag=False),
        Policy("random", _random, _HSA, SPARSITY_TARGET),
        Policy("sparge", None, _HSA, SPARSITY_TARGET, methods=(SpargeAttention(),)),
        Policy("sta", None, _HSA, None, methods=(SlidingTile(((3, 3, 3),), tile=(4, 4)),)),
        Policy("radial", None, _HSA, None, methods=(Radial(),)),
        Policy("vmoba", None, _HSA, None, methods=_VMOBA),
    )
}
"""By name. From `hsa` to `sparge`, all but `hsa-80` keep the same number of blocks over a clip (`sparge` adds those
that their means do not stand for); `-uniform` is without CAG. The last three have rules of their own instead of a
budget. SLA without its linear branch is `top-k`."""


def _attend_with(selection: Selection) -> Callable[..., Tensor]:
    """The attention operator with another policy in front."""

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_mean: Tensor,
        k_mean: Tensor,
        past_k: Tensor,
        past_v: Tensor,
        past_kmean: Tensor,
        frame_slots: Tensor,
        chunk: int,
        *,
        block_q: int,
        block_k: int,
        keep_frames: int,
        sink_frames: int,
        near_frames: int,
        scale: float,
        keep_q20: Sequence[int],
        **_: object,
    ) -> Tensor:
        slots = frame_slots.long()
        keys, values = (
            torch.cat((past_k[slots].flatten(0, 1), k)),
            torch.cat((past_v[slots].flatten(0, 1), v)),
        )
        hsa = HSAConfig(keep_frames, sink_frames, near_frames)
        means = torch.cat((past_kmean[slots], k_mean))
        if len(slots) == 0:
            return dense_attention(q, keys, values, scale)
        selected = selection(q_mean, means, len(slots), int(chunk), hsa, keep_q20)
        mask = selected.repeat_interleave(block_q, 1).repeat_interleave(block_k, 2)
        return dense_attention(q, keys, values, scale, mask)

    return attend


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
        )

        def noise(chunk: int, step: int) -> Tensor:
            out = np.empty((preset.dit.channels, CHUNK_FRAMES, height, width), np.float32)
            fill_noise(out, seed=seed, chunk=chunk, step=step)
            return torch.from_numpy(out)

        rollout = Rollout(
            self.weights.model,
            spec,
            self.weights.embed(prompt),
            noise,
            preset.token_grid(),
            window_frames=self.window_frames,
            sink_frames=1 if self.window_frames else 0,
            attend=self.policy.attend(preset),
        )
        with self._quantized():
            latents = torch.cat(list(rollout.stream(chunks)), dim=1)
        return np.asarray(to_uint8(self.weights.decoder.decode(latents.transpose(0, 1))).numpy())


def reference_row(name: str, weights: Weights, *, long: bool = False, label: str = "") -> ReferenceRow:
    """A row by its policy's name, optionally with a precision: "dense", "hsa", "dense+fp8", "hsa+nvfp4".

    Args:
        long: attend within a window, as a rollout without end must.
        label: prefix of the row's name, for a second set of weights.

    Raises:
        ValueError: there is no such policy or precision.
    """
    policy, _, precision = name.partition("+")
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r}; expected one of {', '.join(POLICIES)}")
    if precision not in ("", *PRECISIONS):
        raise ValueError(f"unknown precision {precision!r}; expected one of {', '.join(PRECISIONS)}")
    window = LONG_WINDOW if long else None
    return ReferenceRow(
        f"{label}{name}", weights, POLICIES[policy], window, PRECISIONS[precision] if precision else None
    )


class BundleRow:
    """A built bundle, run by the runtime."""

    def __init__(self, name: str, path: Path) -> None:
        from runtime import Pipeline

        self.name = name
        self.pipeline = Pipeline.load(path)

    def generate(self, prompt: str, seed: int, chunks: int) -> Frames:
        with self.pipeline.session(prompt=prompt, seed=seed) as session:
            produced = []
            for chunk in session.stream(chunks=chunks):
                produced.append(np.asarray(chunk.frames))
        return np.concatenate(produced)
