"""The reference model that a bundle is compared with, set up from the bundle's own manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.errors import ComparisonError
from export.graph.modules import QUERY_MEANS, StepModule, cache_stems, chunk_stems
from export.graph.oracles import ORACLES
from export.request.built import built_schedule, built_variant
from export.request.methods import attends
from export.request.targets import Variant
from export.request.weights import Weights, shipped_weights
from lightforcing_ref.cache import AttentionSpec, LayerKV
from lightforcing_ref.checkpoint import checkpoint_sha256
from lightforcing_ref.checkpoint.lora import lora_sha256
from lightforcing_ref.config import Preset, preset
from lightforcing_ref.decoders.layers import CacheSpec
from lightforcing_ref.decoders.tae import VideoDecoder
from lightforcing_ref.decoders.vae_encoder import VAEEncoder
from lightforcing_ref.dimensions import DecoderConfig, TAEConfig, VAEConfig
from lightforcing_ref.fp8_cache import oracles
from lightforcing_ref.model import CausalWanModel
from lightforcing_ref.policies import PersistentSet
from lightforcing_ref.rolling import RollingRollout
from lightforcing_ref.rollout import Rollout
from lightforcing_ref.rope import rope_tables
from lightforcing_ref.schedule import FlowSchedule
from lightforcing_ref.sparsity import BlockGeometry, HSAConfig
from runtime.bundle import Manifest, RandomInit, Vae
from runtime.bundle.policies import PbsaPolicy, has_linear_branch, keeps_everything
from runtime.noise import fill_noise

__all__ = [
    "Feed",
    "GraphRollout",
    "Reference",
    "exact_length",
    "require_one_by_one",
    "step_feeds",
    "synthetic_feeds",
    "variant_of",
]

Feed = dict[str, NDArray[Any]]
"""What one run of a component is given, by the names of its inputs."""

_NAN_CODE = 0x7F

CROSS_STEMS = ("cross_k", "cross_v")


def _spec(manifest: Manifest) -> AttentionSpec:
    attention, model = manifest.attention, manifest.model
    return AttentionSpec(
        heads=model.heads,
        geometry=BlockGeometry(model.frame_tokens, attention.block_q, attention.block_k),
        hsa=HSAConfig(attention.keep_frames, attention.sink_frames, attention.near_frames),
        keep_q20=manifest.sparsity.keep_q20,
        scale=attention.scale,
        kv=manifest.cache.kv,
        products=attention.products,
        persistent_frames=manifest.persistent_frames,
        linear_branch=has_linear_branch(attention.method),
    )


def _persistent(manifest: Manifest) -> PersistentSet | None:
    method = manifest.attention.method
    if not isinstance(method, PbsaPolicy):
        return None
    return PersistentSet(method.persistent_frames, method.heads, method.score)


def _attends(
    manifest: Manifest, kernels: Mapping[str, Callable[..., Tensor]] = ORACLES
) -> list[Callable[..., Tensor]]:
    """The oracle of every layer's attention."""
    model = manifest.model
    return attends(manifest.attention.method, model.layers, model.token_grid[1], kernels)


def require_one_by_one(manifest: Manifest) -> None:
    """Refuse a bundle that denoises several chunks in a forward, where forwards of one chunk are looked at.

    Raises:
        ComparisonError: it is such a bundle.
    """
    if manifest.schedule.rolling:
        raise ComparisonError(
            f"{manifest.name} denoises {manifest.schedule.window_chunks} chunks in a forward, and this looks at "
            "forwards of one chunk; compare it with the reference (export compare BUNDLE) or with another bundle"
        )


def variant_of(manifest: Manifest) -> Variant:
    """The variant that a bundle's manifest was written from.

    Raises:
        ComparisonError: it is one of several chunks in a forward.
    """
    require_one_by_one(manifest)
    return built_variant(
        "compared",
        manifest.variant,
        built_schedule(manifest.schedule, manifest.model.chunk_frames),
        attention=manifest.attention,
        sparsity=manifest.sparsity,
        cache=manifest.cache,
        recache="window",  # the methods that stand beside it need not know the bundle's own
    )


def _decoder(vae: Vae, usual: DecoderConfig) -> DecoderConfig:
    """The decoder that a manifest names; the preset's own where it names none."""
    if vae.widths is None:
        return usual
    if vae.kind == "tae":
        return TAEConfig(widths=vae.widths, denormalise=vae.denormalise)
    return VAEConfig(dim=vae.widths[-1])


def _schedule(manifest: Manifest) -> FlowSchedule:
    schedule = manifest.schedule
    return FlowSchedule(
        schedule.timesteps,
        schedule.sigmas,
        schedule.first_timesteps,
        schedule.first_sigmas,
        manifest.model.chunk_frames,
        schedule.clean_forward,
    )


@dataclass(frozen=True)
class Reference:
    """The PyTorch models whose weights a bundle holds."""

    weights: Weights

    @classmethod
    def of(cls, manifest: Manifest) -> Reference:
        """The reference of a bundle whose weights are random, or come with this package.

        Raises:
            ComparisonError: the bundle's weights come from a checkpoint, which must be given.
        """
        origin, model = manifest.provenance.checkpoint, preset(manifest.model.preset)
        if isinstance(origin, RandomInit):
            drawn = Weights(replace(model, vae=_decoder(manifest.vae, model.vae)), seed=origin.random)
            return cls(drawn.with_linear_branch() if has_linear_branch(manifest.attention.method) else drawn)
        shipped = shipped_weights(
            model,
            dense=keeps_everything(manifest.attention.method, manifest.sparsity.target),
            chunk_frames=manifest.model.chunk_frames,
        )
        if shipped is not None and shipped.source == origin.source and not origin.loras:
            if (found := shipped.digests()["checkpoint"]) == origin.sha256:
                return cls(shipped)
            raise ComparisonError(
                f"the bundle's weights are another release, {origin.described}, and this package has {found[:12]}...; "
                "rebuild the bundle"
            )
        raise ComparisonError(
            f"the bundle's weights come from {origin.described}; pass the files it was built from: --checkpoint, "
            f"{'--lora, ' if origin.loras else ''}--vae, --text-encoder, --tokenizer"
        )

    @classmethod
    def from_files(cls, manifest: Manifest, weights: Weights) -> Reference:
        """The reference of a bundle that was built from the files of `weights`.

        Raises:
            ComparisonError: the bundle's weights come from elsewhere.
            CheckpointError: the checkpoint cannot be read.
        """
        origin, checkpoint = manifest.provenance.checkpoint, weights.checkpoint
        assert checkpoint is not None
        if isinstance(origin, RandomInit):
            raise ComparisonError(
                f"{manifest.name} has random weights (seed {origin.random}), not those of {checkpoint}; drop "
                "--checkpoint and the other files"
            )
        if (found := checkpoint_sha256(checkpoint)) != origin.sha256:
            raise ComparisonError(
                f"{manifest.name} was built from {origin.described}, and {checkpoint} is another file "
                f"({found[:12]}...); pass the checkpoint it was built from"
            )
        merged = [(lora_sha256(lora.path), lora.strength) for lora in weights.loras]
        if merged != [(lora.sha256, lora.strength) for lora in origin.loras]:
            raise ComparisonError(
                f"{manifest.name} was built from {origin.described}; give --lora the same files and strengths, in the "
                "same order, or leave it out if there is none"
            )
        digests = weights.digests()
        for role, file in manifest.provenance.files.items():
            if digests.get(role) != file.sha256:
                option = f"--{role.replace('_', '-')}"
                raise ComparisonError(
                    f"{manifest.name} was built with {file.described} as {option}, and another file is given; pass "
                    "that one"
                )
        return cls(weights)

    @property
    def preset(self) -> Preset:
        return self.weights.preset

    @cached_property
    def model(self) -> CausalWanModel:
        return self.weights.dit(torch.float32)

    @cached_property
    def decoder(self) -> VideoDecoder:
        return self.weights.vae_decoder()

    @cached_property
    def encoder(self) -> VAEEncoder:
        return self.weights.vae_encoder()

    @cached_property
    def text_weights(self) -> dict[str, Tensor]:
        return self.weights.text_weights()

    def forget(self, name: Literal["model", "decoder", "text_weights"]) -> None:
        """Let go of weights that are not needed any more; they are read again where they are."""
        self.__dict__.pop(name, None)

    def caches(self, manifest: Manifest) -> list[CacheSpec]:
        """The decoder's streaming caches at the bundle's resolution."""
        return self.decoder.cache_specs(manifest.model.latent_height, manifest.model.latent_width)

    def step_module(self, manifest: Manifest, *, chunk: int | None = None) -> StepModule:
        """The step as a module around the oracle; with `chunk`, as that chunk's specialised graph has it."""
        spec = _spec(manifest)
        if chunk is not None:
            spec = replace(spec, keep_q20=(spec.keep_q20[min(chunk, len(spec.keep_q20) - 1)],))
        prepare, attend = oracles(spec.kv, spec.products)
        attends = _attends(manifest) if spec.kv is None else attend
        return StepModule(self.model, spec, _schedule(manifest), prepare=prepare, attend=attends)

    def rollout(
        self,
        manifest: Manifest,
        embedding: Tensor,
        seed: int,
        *,
        kernels: Mapping[str, Callable[..., Tensor]] = ORACLES,
    ) -> Rollout:
        """A reference rollout with the bundle's settings and the runtime's noise.

        Args:
            kernels: attention operator -> what executes it.
        """
        model, cache = manifest.model, manifest.cache
        return Rollout(
            self.model,
            _spec(manifest),
            embedding,
            _noise(manifest, seed),
            model.token_grid,
            window_frames=manifest.window_frames,
            sink_frames=cache.sink_frames,
            sink_positions=cache.sink_positions,
            schedule=_schedule(manifest),
            attend=_attends(manifest, kernels),
            persistent=_persistent(manifest),
        )

    def rolling(self, manifest: Manifest, embedding: Tensor, seed: int) -> RollingRollout:
        """The same for a bundle whose chunks roll through a window."""
        return RollingRollout(
            self.model,
            _spec(manifest),
            embedding,
            _noise(manifest, seed),
            manifest.model.token_grid,
            schedule=_schedule(manifest),
            attention_frames=manifest.window_frames,
            attend=oracles(manifest.cache.kv)[1],
        )

    def latents(self, manifest: Manifest, embedding: Tensor, seed: int, chunks: int) -> Iterator[Tensor]:
        """Clean latents of the first chunks of a rollout, in the order that the bundle has."""
        if manifest.schedule.rolling:
            return islice(self.rolling(manifest, embedding, seed).generate(), chunks)
        return self.rollout(manifest, embedding, seed).stream(chunks)


def _noise(manifest: Manifest, seed: int) -> Callable[[int, int], Tensor]:
    """The runtime's noise."""
    model = manifest.model
    shape = (model.latent_channels, model.chunk_frames, model.latent_height, model.latent_width)

    def noise(chunk: int, step: int) -> Tensor:
        out = np.empty(shape, dtype=np.float32)
        fill_noise(out, seed=seed, chunk=chunk, step=step)
        return torch.from_numpy(out)

    return noise


def step_feeds(
    reference: Reference, manifest: Manifest, chunks: int, *, embedding: Tensor | None = None, seed: int = 5
) -> Iterator[tuple[int, int, Feed]]:
    """Every forward of a reference rollout as inputs of the `step` component: (chunk, row, inputs).

    `embedding` is the prompt's; without it, one is drawn, such as no text encoder gives.
    Rows are those of the schedule; the last forward of a chunk is the clean one. Cached frames lie in shuffled slots of
    a pool that is larger than needed and otherwise full of NaN, so that a graph which looks anywhere else is found out.
    """
    rng = np.random.default_rng(seed)
    if embedding is None:
        drawn = rng.standard_normal((manifest.text.text_len, manifest.text.dim), dtype=np.float32)
        embedding = torch.from_numpy(drawn)
    rollout = reference.rollout(manifest, embedding, seed)
    schedule = rollout.schedule
    for chunk in range(chunks):
        rollout.cache.make_room(schedule.chunk_frames)
        x = rollout.noise(chunk, 0)
        for row in schedule.rows(chunk):
            yield (
                chunk,
                row,
                _feed(rollout, manifest, x, rollout.following_noise(chunk, row), row, chunk, rng),
            )
            x, _, new = rollout.step(x, row, chunk)
        clean = schedule.clean_step
        yield chunk, clean, _feed(rollout, manifest, x, torch.zeros_like(x), clean, chunk, rng)
        if schedule.clean_forward:
            rollout.commit(x, chunk)
        else:
            rollout.keep(x, chunk, new)


def synthetic_feeds(manifest: Manifest, chunks: int, *, seed: int = 5) -> Iterator[tuple[int, int, Feed]]:
    """Inputs of the `step` component for every forward of a rollout, without a model: (chunk, row, inputs).

    Latents, prompt and cached frames are drawn from the seed. Cached frames lie as in `step_feeds`.
    """
    rng = np.random.default_rng(seed)
    model, text, schedule = manifest.model, manifest.text, manifest.schedule
    per_head = (model.heads, model.head_dim)
    latent = (model.latent_channels, model.chunk_frames, model.latent_height, model.latent_width)

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, dtype=np.float32)

    blocks = [
        slice(start, start + manifest.attention.block_k)
        for start in range(0, model.frame_tokens, manifest.attention.block_k)
    ]
    cross = {
        f"{stem}.{i}": normal(text.text_len, *per_head) for stem in CROSS_STEMS for i in range(model.layers)
    }
    for chunk in range(chunks):
        resident = min(chunk * model.chunk_frames, manifest.cache.max_past_frames)
        past = []
        for _ in range(model.layers):
            k, v = (normal(resident, model.frame_tokens, *per_head) for _ in range(2))
            means = np.stack([k[:, rows].mean(axis=1) for rows in blocks], axis=1)
            past.append((k, v, means))
        for row in (*schedule.rows(chunk), schedule.clean_step):
            x, noise = normal(*latent), normal(*latent)
            recent = manifest.cache.max_past_frames - manifest.persistent_frames
            pinned = min(manifest.cache.sink_frames, resident) + max(0, resident - recent)
            yield chunk, row, _inputs(manifest, x, noise, row, chunk, past, pinned, rng) | cross


class GraphRollout(Rollout):
    """A reference rollout whose forwards are executed by graphs; cache and order of things are the reference's."""

    def __init__(
        self,
        reference: Rollout,
        manifest: Manifest,
        *,
        step: Callable[[Feed], Feed],
        clean: Callable[[Feed], Feed],
        conditioner: Callable[[Feed], Feed],
    ) -> None:
        """Args: a fresh rollout whose settings to take; and the components as functions of their inputs."""
        self._manifest, self._rng = manifest, np.random.default_rng(0)
        self._step, self._clean, self._conditioner = step, clean, conditioner
        super().__init__(**{field.name: getattr(reference, field.name) for field in fields(reference)})

    def _condition(self, text: Tensor) -> list[tuple[Tensor, Tensor]]:
        out = self._conditioner({"text": text.numpy()})
        layers = range(self._manifest.model.layers)
        return [
            (torch.from_numpy(out[f"cross_k.{i}"])[None], torch.from_numpy(out[f"cross_v.{i}"])[None])
            for i in layers
        ]

    def step(self, x: Tensor, row: int, chunk: int) -> tuple[Tensor, Tensor, list[LayerKV]]:
        noise = self.following_noise(chunk, row)
        out = self._step(_feed(self, self._manifest, x, noise, row, chunk, self._rng))
        return torch.from_numpy(out["next_latent"]), torch.from_numpy(out["x0"]), self._new(out)

    def _new(self, out: Feed) -> list[LayerKV]:
        def stem(name: str, layer: int) -> Tensor:
            return torch.from_numpy(out[f"{name}.{layer}"])

        stems, layers = chunk_stems(self._manifest.cache.kv), range(self._manifest.model.layers)
        if self.persistent is not None:
            self.queries = [stem(QUERY_MEANS, layer) for layer in layers]
        return [tuple(stem(name, layer) for name in stems) for layer in layers]

    def commit(self, x0: Tensor, chunk: int) -> None:
        clean = self.schedule.clean_step
        out = self._clean(_feed(self, self._manifest, x0, torch.zeros_like(x0), clean, chunk, self._rng))
        self.keep(x0, chunk, self._new(out))


def _feed(
    rollout: Rollout,
    manifest: Manifest,
    latent: Tensor,
    noise: Tensor,
    step: int,
    chunk: int,
    rng: np.random.Generator,
) -> Feed:
    layers = range(manifest.model.layers)
    past = [tuple(value.numpy() for value in rollout.past(layer, chunk)) for layer in layers]
    pinned = rollout.pinned(rollout.cache.resident(), chunk)
    feed = _inputs(manifest, latent.numpy(), noise.numpy(), step, chunk, past, pinned, rng)
    for layer, (k, v) in enumerate(rollout.cross):
        feed[f"cross_k.{layer}"], feed[f"cross_v.{layer}"] = k[0].numpy(), v[0].numpy()
    return feed


def _inputs(
    manifest: Manifest,
    latent: NDArray[Any],
    noise: NDArray[Any],
    step: int,
    chunk: int,
    past: Sequence[tuple[NDArray[Any], ...]],
    pinned: int,
    rng: np.random.Generator,
) -> Feed:
    """Inputs of the `step` component but for the prompt's; `past`: keys, values and block means of each layer."""
    model, capacity = manifest.model, manifest.cache.max_past_frames
    resident = len(past[0][0])
    positions = torch.arange(chunk * model.chunk_frames, (chunk + 1) * model.chunk_frames)
    cos, sin = rope_tables(positions, model.token_grid, model.head_dim, theta=model.rope.theta)
    slots = rng.permutation(capacity + 2)[:resident]
    frame_slots = np.full(capacity, -1, dtype=np.int32)
    frame_slots[:resident] = slots
    feed: Feed = {
        "latent": latent,
        "noise": noise,
        "step": np.array(step, dtype=np.int32),
        "chunk": np.array(chunk, dtype=np.int32),
        "frame_slots": frame_slots,
        "rope_cos": cos.numpy(),
        "rope_sin": sin.numpy(),
    }
    if manifest.persistent_frames:
        feed["pinned"] = np.array(pinned, dtype=np.int32)
    for layer, cached in enumerate(past):
        for stem, values in zip(cache_stems(manifest.cache.kv), cached, strict=True):
            # What no slot names is NaN, in codes too.
            blank = np.nan if values.dtype == np.float32 else _NAN_CODE
            pool = np.full((capacity + 2, *values.shape[1:]), blank, dtype=values.dtype)
            pool[slots] = values
            feed[f"{stem}.{layer}"] = pool
    return feed


def exact_length(feed: Feed) -> Feed:
    """A feed of the `step` component for a specialised graph: a cache of exactly the resident frames, in order."""
    slots = feed["frame_slots"][feed["frame_slots"] >= 0]
    exact = {
        name: value[slots] if name.rpartition(".")[0] in cache_stems("fp8") else value
        for name, value in feed.items()
    }
    return {**exact, "frame_slots": np.arange(len(slots), dtype=np.int32)}
