"""The reference model that a bundle is compared with, set up from the bundle's own manifest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightforcing_ref.attention import hsa_attention, qk_prepare
from lightforcing_ref.cache import AttentionSpec
from lightforcing_ref.config import Preset, preset
from lightforcing_ref.model import CausalWanModel
from lightforcing_ref.rollout import Rollout
from lightforcing_ref.rope import rope_tables
from lightforcing_ref.schedule import FlowSchedule
from lightforcing_ref.sparsity import BlockGeometry, HSAConfig
from lightforcing_ref.vae import CacheSpec, VAEDecoder
from runtime.bundle import Manifest, RandomInit
from runtime.noise import fill_noise

from .errors import ComparisonError
from .modules import CACHE_STEMS, StepModule
from .weights import Weights

__all__ = ["Reference", "exact_length", "step_feeds"]

Feed = dict[str, NDArray[Any]]


def _spec(manifest: Manifest) -> AttentionSpec:
    attention, model = manifest.attention, manifest.model
    return AttentionSpec(
        heads=model.heads,
        geometry=BlockGeometry(model.frame_tokens, attention.block_q, attention.block_k),
        hsa=HSAConfig(attention.keep_frames, attention.sink_frames, attention.near_frames),
        keep_q20=manifest.sparsity.keep_q20,
        scale=attention.scale,
    )


def _schedule(manifest: Manifest) -> FlowSchedule:
    return FlowSchedule(manifest.schedule.timesteps, manifest.schedule.sigmas)


@dataclass(frozen=True)
class Reference:
    """The PyTorch models whose weights a bundle holds."""

    weights: Weights

    @classmethod
    def of(cls, manifest: Manifest) -> Reference:
        """The reference of a bundle with random weights.

        Raises:
            ComparisonError: the bundle's weights come from a checkpoint, which must be given.
        """
        origin = manifest.provenance.checkpoint
        if not isinstance(origin, RandomInit):
            raise ComparisonError(
                f"the bundle's weights come from {origin.source} (SHA-256 {origin.sha256[:12]}...); pass the files it "
                "was built from: --checkpoint, --vae, --text-encoder, --tokenizer"
            )
        return cls(Weights(preset(manifest.model.preset), seed=origin.random))

    @property
    def preset(self) -> Preset:
        return self.weights.preset

    @cached_property
    def model(self) -> CausalWanModel:
        return self.weights.dit(torch.float32)

    @cached_property
    def decoder(self) -> VAEDecoder:
        return self.weights.vae_decoder()

    @cached_property
    def text_weights(self) -> dict[str, Tensor]:
        return self.weights.text_weights()

    def caches(self, manifest: Manifest) -> list[CacheSpec]:
        """The decoder's streaming caches at the bundle's resolution."""
        return self.decoder.cache_specs(manifest.model.latent_height, manifest.model.latent_width)

    def step_module(self, manifest: Manifest, *, chunk: int | None = None) -> StepModule:
        """The step as a module around the oracle; with `chunk`, as that chunk's specialised graph has it."""
        spec = _spec(manifest)
        if chunk is not None:
            spec = replace(spec, keep_q20=(spec.keep_q20[min(chunk, len(spec.keep_q20) - 1)],))
        return StepModule(self.model, spec, _schedule(manifest), prepare=qk_prepare, attend=hsa_attention)

    def rollout(self, manifest: Manifest, embedding: Tensor, seed: int) -> Rollout:
        """A reference rollout with the bundle's settings and the runtime's noise."""
        model, cache = manifest.model, manifest.cache
        shape = (model.latent_channels, model.chunk_frames, model.latent_height, model.latent_width)

        def noise(chunk: int, step: int) -> Tensor:
            out = np.empty(shape, dtype=np.float32)
            fill_noise(out, seed=seed, chunk=chunk, step=step)
            return torch.from_numpy(out)

        return Rollout(
            self.model,
            _spec(manifest),
            embedding,
            noise,
            model.token_grid,
            window_frames=manifest.window_frames,
            sink_frames=cache.sink_frames,
            sink_positions=cache.sink_positions,
            schedule=_schedule(manifest),
        )


def step_feeds(
    reference: Reference, manifest: Manifest, chunks: int, *, seed: int = 5
) -> Iterator[tuple[int, int, Feed]]:
    """Every forward of a reference rollout as inputs of the `step` component: (chunk, step, inputs).

    The last step of a chunk is the clean forward. Cached frames lie in shuffled slots of a pool that is larger than
    needed and otherwise full of NaN, so that a graph which looks anywhere else is found out.
    """
    rng = np.random.default_rng(seed)
    text = rng.standard_normal((manifest.text.text_len, manifest.text.dim), dtype=np.float32)
    rollout = reference.rollout(manifest, torch.from_numpy(text), seed)
    frames, steps = manifest.model.chunk_frames, manifest.schedule.denoise_steps
    for chunk in range(chunks):
        rollout.cache.make_room(frames)
        x = rollout.noise(chunk, 0)
        for step in range(steps):
            following = rollout.noise(chunk, step + 1) if step + 1 < steps else torch.zeros_like(x)
            yield chunk, step, _feed(rollout, manifest, x, following, step, chunk, rng)
            x, _ = rollout.step(x, step, chunk)
        yield chunk, steps, _feed(rollout, manifest, x, torch.zeros_like(x), steps, chunk, rng)
        rollout.commit(x, chunk)


def _feed(
    rollout: Rollout,
    manifest: Manifest,
    latent: Tensor,
    noise: Tensor,
    step: int,
    chunk: int,
    rng: np.random.Generator,
) -> Feed:
    model, capacity = manifest.model, manifest.cache.max_past_frames
    resident = rollout.cache.resident()
    positions = torch.arange(chunk * model.chunk_frames, (chunk + 1) * model.chunk_frames)
    cos, sin = rope_tables(positions, model.token_grid, model.head_dim, theta=model.rope.theta)
    slots = rng.permutation(capacity + 2)[: len(resident)]
    frame_slots = np.full(capacity, -1, dtype=np.int32)
    frame_slots[: len(resident)] = slots
    feed: Feed = {
        "latent": latent.numpy(),
        "noise": noise.numpy(),
        "step": np.array(step, dtype=np.int32),
        "chunk": np.array(chunk, dtype=np.int32),
        "frame_slots": frame_slots,
        "rope_cos": cos.numpy(),
        "rope_sin": sin.numpy(),
    }
    for layer, (k, v) in enumerate(rollout.cross):
        feed[f"cross_k.{layer}"], feed[f"cross_v.{layer}"] = k[0].numpy(), v[0].numpy()
        for stem, values in zip(CACHE_STEMS, rollout.past(layer, chunk), strict=True):
            pool = np.full((capacity + 2, *values.shape[1:]), np.nan, dtype=np.float32)
            pool[slots] = values.numpy()
            feed[f"{stem}.{layer}"] = pool
    return feed


def exact_length(feed: Feed) -> Feed:
    """A feed of the `step` component for a specialised graph: a cache of exactly the resident frames, in order."""
    slots = feed["frame_slots"][feed["frame_slots"] >= 0]
    exact = {
        name: value[slots] if name.rpartition(".")[0] in CACHE_STEMS else value
        for name, value in feed.items()
    }
    return {**exact, "frame_slots": np.arange(len(slots), dtype=np.int32)}
