"""The modules that are traced: one forward of one chunk, and the prompt conditioning.

They drive the reference model's own blocks, so what is exported is the oracle with another attention callable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightforcing_ref.cache import AttentionSpec, CachedAttention, KVFormat
from lightforcing_ref.model import CausalWanModel
from lightforcing_ref.schedule import FlowSchedule

__all__ = [
    "QUERY_MEANS",
    "ConditionerModule",
    "StepModule",
    "cache_stems",
    "chunk_stems",
    "layer_names",
    "layer_stems",
    "merge_qkv",
]


QUERY_MEANS = "qmean"
"""Outputs of the step, one per layer, by which a persistent set chooses its blocks."""


def cache_stems(kv: KVFormat | None) -> tuple[str, ...]:
    """Inputs of the step that hold the cache, one of each per layer, in the order of `LayerKV`."""
    return ("past_k", "past_v", "past_kmean", *(("past_kscale", "past_vscale") if kv else ()))


def chunk_stems(kv: KVFormat | None) -> tuple[str, ...]:
    """Outputs of the step that a commit copies into the cache, in the same order."""
    return tuple(stem.removeprefix("past_") for stem in cache_stems(kv))


def layer_stems(kv: KVFormat | None) -> tuple[str, ...]:
    """Inputs of the step of which there is one per layer, in their order."""
    return ("cross_k", "cross_v", *cache_stems(kv))


def layer_names(stem: str, layers: int) -> list[str]:
    """Tensor names of one quantity in every layer: `stem.0`, `stem.1`, ..."""
    return [f"{stem}.{layer}" for layer in range(layers)]


def merge_qkv(model: CausalWanModel) -> None:
    """Give every self-attention one merged projection, in place, one layer at a time (peak: one layer twice)."""
    for block in model.layers:
        block.self_attn.merge()


class StepModule(nn.Module):
    """One forward of one chunk and its scheduler step, for every chunk and every timestep.

    The timesteps are constants, so their modulations (time embedding, projection, and each block's own addend) are
    folded into tables that `step` indexes.

    Args:
        model: with merged projections; its time embedding is evaluated here and not exported.
        prepare, attend: the operators, usually the exportable ones; `attend` is one for all layers, or one for each.
    """

    model: CausalWanModel
    sigmas: Tensor
    head_modulation: Tensor

    def __init__(
        self,
        model: CausalWanModel,
        spec: AttentionSpec,
        schedule: FlowSchedule,
        *,
        prepare: Callable[..., tuple[Tensor, ...]],
        attend: Callable[..., Tensor] | Sequence[Callable[..., Tensor]],
    ) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self.prepare, self.attend = prepare, attend
        with torch.no_grad():
            e, e0 = model.modulations(torch.tensor(schedule.row_timesteps, dtype=torch.float64))
            for layer, block in enumerate(model.layers):
                self.register_buffer(f"modulation_{layer}", block.modulation + e0)
            self.register_buffer("head_modulation", model.head.modulation + e[:, None])
        sigmas = torch.tensor([schedule.row_sigmas, schedule.row_following], dtype=torch.float32)
        self.register_buffer("sigmas", sigmas)

    def forward(
        self,
        latent: Tensor,
        noise: Tensor,
        step: Tensor,
        chunk: Tensor,
        frame_slots: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        cross_k: Sequence[Tensor],
        cross_v: Sequence[Tensor],
        *past: Any,
    ) -> tuple[Tensor, Tensor, *tuple[list[Tensor], ...]]:
        """Shapes are those of the `step` component; see docs/bundle.md. `past` is as `cache_stems` lists it, and behind
        it, with a persistent set, what is pinned.
        """
        index = step.reshape(1)
        pinned: Tensor | int = 0
        if self.spec.persistent_frames:
            past, pinned = past[:-1], past[-1]
        core = CachedAttention(
            self.spec,
            rope_cos,
            rope_sin,
            list(zip(*past, strict=True)),
            frame_slots,
            chunk,
            prepare=self.prepare,
            attend=self.attend,
            pinned=pinned,
        )
        model = self.model
        tokens = model.tokens(latent[None])
        for layer, block in enumerate(model.layers):
            modulation = getattr(self, f"modulation_{layer}").index_select(0, index).chunk(6, dim=1)
            cross = cross_k[layer][None], cross_v[layer][None]
            tokens = block(tokens, modulation, cross, layer, core)
        out = model.head(tokens, self.head_modulation.index_select(0, index).chunk(2, dim=1))
        flow = model.latents(out, *latent.shape[1:])[0].float()
        sigma, following = self.sigmas.index_select(1, index).chunk(2, dim=0)
        x0 = latent - sigma * flow
        following_latent = (1 - following) * x0 + following * noise
        left = [list(part) for part in zip(*core.new, strict=True)]
        if self.spec.persistent_frames:
            left.append(core.queries)
        return following_latent, x0, *left

    @property
    def input_names(self) -> list[str]:
        layers = self.model.config.layers
        names = ["latent", "noise", "step", "chunk", "frame_slots", "rope_cos", "rope_sin"]
        for stem in layer_stems(self.spec.kv):
            names += layer_names(stem, layers)
        return [*names, "pinned"] if self.spec.persistent_frames else names

    @property
    def output_names(self) -> list[str]:
        layers = self.model.config.layers
        names = ["next_latent", "x0"]
        for stem in chunk_stems(self.spec.kv):
            names += layer_names(stem, layers)
        return [*names, *layer_names(QUERY_MEANS, layers)] if self.spec.persistent_frames else names

    def example_inputs(
        self, latent_size: tuple[int, int], past_frames: int, chunk_frames: int
    ) -> tuple[Any, ...]:
        """Inputs with the right shapes and types, for tracing."""
        slots = 2  # a size of its own, which stands for any number of slots and costs little memory
        config, geometry = self.model.config, self.spec.geometry
        dtype = self.model.dtype
        heads, head_dim, layers = config.heads, config.head_dim, config.layers
        tokens = chunk_frames * geometry.frame_tokens

        def per_layer(*shape: int, dtype: torch.dtype = dtype) -> list[Tensor]:
            return [torch.zeros(shape, dtype=dtype) for _ in range(layers)]

        latent = torch.zeros(config.channels, chunk_frames, *latent_size)
        scalar = torch.zeros((), dtype=torch.int32)
        rope = torch.zeros(tokens, head_dim // 2)
        by_token = (slots, geometry.frame_tokens, heads, head_dim)
        if self.spec.kv is None:
            keys, values = per_layer(*by_token), per_layer(*by_token)
        else:
            keys = per_layer(*by_token, dtype=torch.uint8)
            by_block = (slots, geometry.k_blocks, heads, head_dim, geometry.block_k)
            values = per_layer(*by_block, dtype=torch.uint8)
        scales = [
            per_layer(slots, geometry.k_blocks, heads, dtype=torch.float32)
            for _ in cache_stems(self.spec.kv)[3:]
        ]
        return (
            latent,
            latent.clone(),
            scalar,
            scalar.clone(),
            torch.full((past_frames,), -1, dtype=torch.int32),
            rope,
            rope.clone(),
            per_layer(config.text_len, heads, head_dim),
            per_layer(config.text_len, heads, head_dim),
            keys,
            values,
            per_layer(slots, geometry.k_blocks, heads, head_dim, dtype=torch.float32),
            *scales,
            *((scalar.clone(),) if self.spec.persistent_frames else ()),
        )


class ConditionerModule(nn.Module):
    """Cross-attention keys and values of every layer, computed once per prompt."""

    model: CausalWanModel

    def __init__(self, model: CausalWanModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, text: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Map text-encoder output `[text_len, text_dim]` float32 to per-layer `[text_len, H, D]`."""
        pairs = self.model.embed_text(text[None])
        return [k[0] for k, _ in pairs], [v[0] for _, v in pairs]

    @property
    def output_names(self) -> list[str]:
        layers = self.model.config.layers
        return layer_names("cross_k", layers) + layer_names("cross_v", layers)
