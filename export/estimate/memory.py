"""How much memory a bundle will take where it runs, planned before anything is built.

Buffers are those that the runtime allocates; weights are those that a bundle holds; activation memory is what
`engines/expectations` allows an engine, so a build that needs more fails. Nothing here needs PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, Literal, Protocol

from export.request.capability import BACKENDS, known_capabilities
from export.request.linears import linear_precisions
from export.request.selection import selection_bytes
from export.request.sizes import (
    CONDITIONER_LINEARS,
    Sized,
    conditioner_parameters,
    decoder_convs,
    decoder_parameters,
    encoder_convs,
    encoder_parameters,
    item_bytes,
    layer_linears,
    step_parameters,
    text_layer_parameters,
    text_outer_parameters,
)
from export.request.targets import Precision, Target
from export.units import readable_size
from lightforcing_ref.dimensions import VAEConfig
from lightforcing_ref.sparsity import BlockGeometry
from runtime.bundle import ENCODER_COMPONENTS
from runtime.bundle.policies import persistent_frames
from runtime.host_memory import memory

__all__ = ["Group", "MemoryItem", "MemoryPlan", "Planned", "plan_memory"]

Group = Literal["weights", "cache", "buffers", "activations", "reserved"]

CONTEXT_BYTES = 640 << 20
"""What the CUDA context, the driver and the loaded kernels take. An assumption; nothing measures it here."""

TIGHT = 0.9
"""Share of the memory from which on a plan that fits is called tight."""


class Planned(Sized, Protocol):
    """What a plan is made for; a build request is one."""

    @property
    def target(self) -> Target: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def skip(self) -> tuple[str, ...]: ...
    @property
    def encoder(self) -> VAEConfig | None: ...


@dataclass(frozen=True)
class MemoryItem:
    """One part of the memory.

    Attributes:
        per_session: whether each session has its own; `bytes` is then that of one.
    """

    group: Group
    name: str
    bytes: int
    per_session: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of one bundle with `sessions` sessions. Sizes in bytes.

    Attributes:
        capacity: the target's memory, or what this machine has available for a target that is the machine itself;
            None = unknown.
        capacity_of: what `capacity` belongs to.
        host_bytes: what stays outside of the target's memory: the text encoder's weights, streamed layer by layer.
        prompt_bytes: what of these a prompt reads, unless they are kept in main memory: all layers.
    """

    items: tuple[MemoryItem, ...]
    sessions: int
    capacity: int | None
    capacity_of: str
    host_bytes: int
    prompt_bytes: int

    @property
    def shared(self) -> int:
        """Bytes that sessions share."""
        return sum(item.bytes for item in self.items if not item.per_session)

    @property
    def per_session(self) -> int:
        """Bytes that one session costs."""
        return sum(item.bytes for item in self.items if item.per_session)

    @property
    def peak(self) -> int:
        """Bytes of everything together."""
        return self.shared + self.sessions * self.per_session

    @property
    def fits(self) -> bool | None:
        """None where the capacity is not known."""
        return None if self.capacity is None else self.peak <= self.capacity

    @property
    def most_sessions(self) -> int | None:
        """How many sessions fit."""
        if self.capacity is None:
            return None
        return max(0, (self.capacity - self.shared) // self.per_session)

    @property
    def verdict(self) -> str:
        """One sentence: whether it fits and what to do where it does not."""
        need = f"{self.sessions} session{'s' if self.sessions > 1 else ''} need{'' if self.sessions > 1 else 's'}"
        if self.capacity is None:
            return f"unknown: {need} {readable_size(self.peak)}, and {self.capacity_of} does not tell how much it has"
        have = f"{readable_size(self.peak)} of {readable_size(self.capacity)} ({self.capacity_of})"
        if self.peak > self.capacity:
            return (
                f"does not fit: {need} {have}; use fewer sessions, a lower precision, a smaller --resolution or a "
                "shorter --window"
            )
        word = "fits" if self.peak <= TIGHT * self.capacity else "fits, but tightly"
        return f"{word}: {need} {have}; at most {self.most_sessions} would fit"

    def group(self, group: Group) -> int:
        """Bytes of a group, with all sessions."""
        return sum(
            item.bytes * (self.sessions if item.per_session else 1)
            for item in self.items
            if item.group == group
        )

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        figures = ("shared", "per_session", "peak", "fits", "most_sessions", "verdict")
        return {**asdict(self), **{name: getattr(self, name) for name in figures}}


def plan_memory(request: Planned, sessions: int = 1) -> MemoryPlan:
    """Plan the memory of `sessions` sessions.

    Raises:
        ConfigError: the resolution does not divide.
        InputError: nothing is known about engines of this precision.
    """
    plan = _Planner(request, sessions)
    target = request.target
    if target.memory_gib is not None:
        capacity: int | None = int(target.memory_gib * 2**30)
    else:
        capacity = memory().available
    items = (*plan.weights(), *plan.cache(), *plan.buffers(), *plan.activations(), *plan.reserved())
    text = request.preset.text
    layers = text.layers * text_layer_parameters(text)
    return MemoryPlan(
        items=tuple(item for item in items if item.bytes),
        sessions=sessions,
        capacity=capacity,
        capacity_of="this machine, available now" if target.memory_gib is None else target.title,
        host_bytes=(layers + text_outer_parameters(text)) * item_bytes(request.precision),
        prompt_bytes=layers * item_bytes(request.precision),
    )


class _Planner:
    def __init__(self, request: Planned, sessions: int) -> None:
        self.request, self.sessions = request, sessions
        self.dit, self.vae, self.encoder = request.preset.dit, request.preset.vae, request.encoder
        self.item = item_bytes(request.precision)
        self.formats = linear_precisions(request)
        self.on_gpu = request.target.compute_capability is not None
        self.latent_size = request.preset.latent_size(request.height, request.width)
        blocks = request.variant.blocks(request.target, request.preset.block)
        frame_tokens = request.preset.frame_tokens(request.height, request.width)
        self.geometry = BlockGeometry(frame_tokens, blocks.query, blocks.key)
        self.schedule = request.variant.schedule.resolved()
        self.chunk_frames = self.schedule.chunk_frames
        self.rows = len(self.schedule.row_timesteps)
        self.tokens = self.chunk_frames * frame_tokens
        self.past, self.held = request.variant.max_past_frames, request.variant.held_frames
        self.rolling = request.variant.schedule.rolling
        self.window_chunks = request.variant.schedule.window_chunks
        self.virtual = persistent_frames(request.variant.attention)

    def weights(self) -> Iterator[MemoryItem]:
        """Weights by component, as the bundle's files hold them."""
        dit, formats = self.dit, self.formats
        sizes = {"step": 0, "conditioner": 0}
        for layer in range(dit.layers):
            for linear in layer_linears(dit):
                part = "conditioner" if linear.kind in CONDITIONER_LINEARS else "step"
                sizes[part] += linear.bytes(formats[f"blocks.{layer}.{linear.kind}"])
        yield MemoryItem("weights", "transformer, block linears", sizes["step"])
        yield MemoryItem(
            "weights",
            "transformer, everything else",
            self.item * step_parameters(dit, self.rows) + 4 * 2 * self.rows,
        )
        conditioner = sizes["conditioner"] + self.item * conditioner_parameters(dit)
        yield MemoryItem("weights", "conditioner", conditioner)
        both = 2 * self.item * decoder_parameters(self.vae)
        yield MemoryItem("weights", "video decoder, first and later frames", both)
        if self.encoder is not None:
            both = 2 * self.item * encoder_parameters(self.encoder)
            yield MemoryItem("weights", "video encoder, first and later frames", both)
        layer = self.item * text_layer_parameters(self.request.preset.text)
        yield MemoryItem("weights", "text encoder, the layer at work", layer)

    def _frames(self, frames: int) -> tuple[int, int, int]:
        """Bytes of keys, of values and of the keys' block means for cached frames, all layers."""
        elements = self.dit.layers * self.dit.dim * frames
        tokens, blocks = self.geometry.frame_tokens, self.geometry.k_blocks
        means = elements * blocks * 4
        if self.request.variant.cache.kv is None:
            return elements * tokens * self.item, elements * tokens * self.item, means
        scales = self.dit.layers * self.dit.heads * frames * blocks * 4
        # Codes of values come in whole blocks.
        return elements * tokens + scales, elements * blocks * self.geometry.block_k + scales, means

    def cache(self) -> Iterator[MemoryItem]:
        """Keys and values of past frames, and what else a session keeps."""
        keys, values, means = self._frames(max(1, self.held))  # a pool is never empty
        virtual = sum(self._frames(self.virtual)[:2])
        past = keys + values - virtual
        yield MemoryItem("cache", "keys and values of past frames", past, per_session=True)
        yield MemoryItem("cache", "keys and values of persistent blocks", virtual, per_session=True)
        yield MemoryItem("cache", "block means of the keys", means, per_session=True)
        policy = self.request.variant.cache
        if policy.sink_positions == "window":
            sink_keys, _, sink_means = self._frames(policy.sink_frames)
            yield MemoryItem("cache", "sink keys as committed", sink_keys + sink_means, per_session=True)
        cross = 2 * self.dit.layers * self.dit.text_len * self.dit.dim * self.item
        yield MemoryItem("cache", "cross-attention keys and values", cross, per_session=True)
        decoder = sum(prod(shape) for shape in self.decoder_caches)
        yield MemoryItem("cache", "video decoder, two sets", 2 * decoder * self.item, per_session=True)
        latents = self._latent_slots() * self._latent
        yield MemoryItem("cache", "latents kept for prompt switches", latents, per_session=True)
        if self.rolling:
            window = self.schedule.most_steps * self._latent
            yield MemoryItem("cache", "latents of the window's chunks", window, per_session=True)

    @cached_property
    def decoder_caches(self) -> list[tuple[int, ...]]:
        shapes = (conv.cache_shape(*self.latent_size) for conv in decoder_convs(self.vae))
        return [shape for shape in shapes if shape is not None]

    @property
    def _latent(self) -> int:
        """Bytes of a chunk's latent."""
        return 4 * self.dit.channels * self.chunk_frames * prod(self.latent_size)

    def _latent_slots(self) -> int:
        """Chunks whose latents are kept: those of sinks, those that recent frames can touch, and two in flight."""
        sinks = self.request.variant.cache.sink_frames
        recent = self.held - self.virtual - sinks
        return -(-sinks // self.chunk_frames) + (-(-recent // self.chunk_frames) + 1 if recent else 0) + 2

    def _joint_chunks(self) -> int:
        variant = self.request.variant
        return variant.window_frames // self.chunk_frames if variant.cache.recache == "joint" else 0

    def buffers(self) -> Iterator[MemoryItem]:
        """What passes between the parts of a chunk's work."""
        dit, tokens = self.dit, self.tokens
        yield MemoryItem("buffers", "keys and values of the chunk", sum(self._frames(self.chunk_frames)))
        if self.rolling:
            others = sum(self._frames(self.chunk_frames * (self.window_chunks - 1)))
            yield MemoryItem("buffers", "keys and values of the window's other chunks", others)
        # noise and denoised latents per denoising step, the clean one, x0; one latent frame for the decoder
        count = self.schedule.noises + (0 if self.rolling else self.schedule.most_steps) + 2
        latents = count * self._latent + self._latent // self.chunk_frames
        yield MemoryItem("buffers", "latents and noise", latents)
        rope = 2 * 4 * tokens * (dit.head_dim // 2)
        prompt = 4 * dit.text_len * dit.text_dim
        slots = 4 * (1 + self.past + self.chunk_frames)  # chunk, past frames, where its own go
        yield MemoryItem("buffers", "rotary tables, prompt, slot table", rope + prompt + slots)
        cache = self.request.variant.cache
        sinks = cache.sink_frames if cache.sink_positions == "window" else 0
        pairs = dit.head_dim // 2 - 2 * (dit.head_dim // 6)  # of rotary angles along time
        turn = 4 * sinks * (1 + 2 * pairs)
        yield MemoryItem("buffers", "step numbers, turn of the sinks", 4 * self.rows + turn)
        frames = (1 + self.vae.temporal_factor) * self.request.height * self.request.width * 3
        yield MemoryItem("buffers", "pixels", frames)
        if self.encoder is not None:
            shapes = (conv.cache_shape(*self.latent_size) for conv in encoder_convs(self.encoder))
            caches = 2 * self.item * sum(prod(shape) for shape in shapes if shape is not None)
            latent = self._latent // self.chunk_frames
            yield MemoryItem(
                "buffers", "video encoder, two sets of caches, pixels", caches + 4 * frames + latent
            )
        q_blocks = self.chunk_frames * self.geometry.q_blocks
        key_blocks = (self.past + self.chunk_frames) * self.geometry.k_blocks
        if self.virtual:
            # Query means of every layer, importance of blocks, numbers of frames, and scores, which a GPU has anyway.
            scores = 4 * dit.heads * key_blocks * (1 if self.on_gpu else 1 + q_blocks)
            means = (dit.layers - self.on_gpu) * 4 * q_blocks * dit.dim
            yield MemoryItem("buffers", "choice of persistent blocks", means + scores + 4 * (1 + 2))
        if not self.on_gpu:
            return
        # Residual stream twice, projection, queries, attention output; then what the selection kernels share.
        between = (2 + 3 + 1 + 1) * tokens * dit.dim * self.item
        projections = {format for name, format in self.formats.items() if name.endswith("self_attn.qkv")}
        builds = self.request.target.compute_capability in known_capabilities(BACKENDS["tensorrt-rtx"])
        if builds and projections <= {"fp8", "nvfp4"}:
            between += tokens * self.item  # the scale of each token's projection
        columns = self.request.preset.token_grid(self.request.height, self.request.width)[1]
        method, window = self.request.variant.attention, (self.past, self.chunk_frames)
        selection = 4 * q_blocks * dit.dim
        selection += selection_bytes(method, self.geometry, columns, *window, dit.heads, dit.head_dim)
        yield MemoryItem("buffers", "between segments and kernels", between + selection)
        # Residual stream twice, queries, rotary tables, pooled queries, and where their frames go.
        each = 3 * tokens * dit.dim * self.item + rope + 4 * q_blocks * dit.dim + 4 * self.chunk_frames
        if joint := self._joint_chunks():
            size = joint * (each + self._latent)
            yield MemoryItem("buffers", "chunks that are recomputed at once", size)
        if self.rolling:
            yield MemoryItem("buffers", "chunks that are denoised at once", self.window_chunks * each)
        text = 4 * dit.text_len * (2 * self.request.preset.text.d_model + 1)
        yield MemoryItem("buffers", "text encoder's states and mask", text)

    def activations(self) -> Iterator[MemoryItem]:
        """Upper bounds of what the engines use while they run: a block for each of the queues that run side by side."""
        if not self.on_gpu:
            return
        from export.backends.tensorrt_rtx.expectations import Structure, decoder_kind, load_expectations

        used = {self.request.precision, *self.formats.values()}
        known = [load_expectations("bf16" if one == "fp32" else one).components for one in sorted(used)]
        structure = Structure.of(self.request)
        for name, components in (
            ("transformer, at most", ("first", "layer", "last", "conditioner")),
            ("text encoder, at most", ("text_encoder",)),
            ("video decoder, at most", ("vae_first", "vae_next")),
        ):
            kinds = [decoder_kind(component, self.vae) for component in components]
            bound = max(one[kind].activation_bytes.bytes(structure) for one in known for kind in kinds)
            if self.encoder is not None and name.startswith("transformer"):  # they share a queue
                own = replace(structure, pixels=self.request.height * self.request.width * self.encoder.dim)
                encoders = (
                    one[kind].activation_bytes.bytes(own) for one in known for kind in ENCODER_COMPONENTS
                )
                bound = max(bound, *encoders)
            yield MemoryItem("activations", name, bound)

    def reserved(self) -> Iterator[MemoryItem]:
        """What is taken before the first buffer."""
        if self.on_gpu:
            yield MemoryItem("reserved", "CUDA context and kernels (assumed)", CONTEXT_BYTES)
