"""The reference rollout: chunk by chunk, four denoising forwards and a clean pass. The oracle for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .attention import hsa_attention
from .cache import AttentionSpec, CachedAttention, FrameCache, LayerKV, SinkPositions
from .errors import ConfigError
from .fp8_cache import hsa_attention_e4m3, with_fp8_cache
from .model import CausalWanModel, CrossKV
from .policies import PersistentSet, block_weights
from .rope import rope_tables
from .schedule import FlowSchedule

__all__ = ["Noise", "Recache", "Rollout"]

Noise = Callable[[int, int], Tensor]
"""(chunk, step) -> noise `[channels, frames, h, w]`; step 0 is the initial latent, later ones are re-noising."""

Recache = Literal["window", "all", "none", "joint", "flush", "cut"]
"""What a prompt switch does to cached frames: recompute all but the sinks, or all, chunk by chunk; nothing; recompute
all that attention sees in one forward without a mask (LongLive); forget all but the sinks and the latest
(Infinity-RoPE); and moreover let what follows lie far from them in time."""


@dataclass
class Rollout:
    """Generates latents chunk by chunk.

    Args:
        text: text-encoder output `[text_len, text_dim]`.
        window_frames: attention window in latent frames, sink, virtual and current ones included; None = unlimited.

    The clean pass of a chunk runs when the next chunk is asked for, never after the last. A schedule without one caches
    what the last denoising forward leaves.
    """

    model: CausalWanModel
    spec: AttentionSpec
    text: Tensor
    noise: Noise
    grid: tuple[int, int]
    """Tokens per frame as (height, width)."""
    window_frames: int | None = None
    sink_frames: int = 0
    sink_positions: SinkPositions = "absolute"
    flush_frames: int = 2
    """Latest frames that outlive a flush or a cut."""
    cut_frames: int = 42
    """How far a cut moves what follows it, in latent frames."""
    schedule: FlowSchedule = field(default_factory=FlowSchedule.warped)
    attend: Callable[..., Tensor] | Sequence[Callable[..., Tensor]] = hsa_attention
    """The attention operator, one for all layers or one for each; the oracle unless another execution or policy is
    under study. With products of eight bits, the oracle whatever is given."""
    persistent: PersistentSet | None = None
    """Blocks that outlive the window; of `spec.persistent_frames` frames, for `persistent_block_attention`."""

    def __post_init__(self) -> None:
        self._check_persistent()
        window, virtual = self.window_frames, self.spec.persistent_frames
        self.cache = FrameCache(
            self.model.config,
            self.spec.geometry,
            None if window is None else window - virtual,
            self.sink_frames,
            self.sink_positions,
            self.spec.kv,
        )
        self.latents: dict[int, Tensor] = {}
        self.next_chunk = 0
        self._jumps: list[tuple[int, int]] = []
        self._pending: Tensor | None = None
        self.queries: list[Tensor] = []
        self.cross = self._condition(self.text)

    def _check_persistent(self) -> None:
        chunk, virtual = self.schedule.chunk_frames, self.spec.persistent_frames
        if virtual != (self.persistent.frames if self.persistent else 0):
            raise ConfigError(
                f"the operator counts {virtual} persistent frames, the set is {self.persistent}"
            )
        if virtual and (
            self.window_frames is None or self.window_frames < virtual + self.sink_frames + 2 * chunk
        ):
            raise ConfigError(
                f"the window is {self.window_frames}; expected at least {virtual + self.sink_frames + 2 * chunk} "
                f"frames: {self.sink_frames} sinks, {virtual} persistent ones, and two chunks, so that every frame is "
                "resident before it is evicted"
            )

    def _condition(self, text: Tensor) -> list[CrossKV]:
        with torch.no_grad():
            return self.model.embed_text(text[None])

    def set_prompt(self, text: Tensor, recache: Recache = "window") -> int:
        """Switch the prompt from the next chunk on; "window" and "all" recompute block-causally, oldest first.

        A persistent set stays as it is where sinks do: under "window" and "none". The others forget it.

        Returns the index of the chunk where the new prompt applies.

        Raises:
            ConfigError: "joint" with a persistent set, whose blocks no forward can recompute.
        """
        if recache == "joint" and self.persistent is not None:
            raise ConfigError("a joint recache is for full attention, and there is a persistent set")
        if recache == "joint" and self.next_chunk:
            self.cross = self._condition(text)
            self._recache_jointly()
            return self.next_chunk
        self._commit_pending()
        self.cross = self._condition(text)
        if recache in ("none", "joint") or self.next_chunk == 0:
            return self.next_chunk
        if recache == "all":
            self.cache.virtual.clear()  # of its blocks there are no latents to recompute them from
        if recache in ("flush", "cut"):
            self.cache.flush(self.flush_frames)
            first = self.next_chunk * self.schedule.chunk_frames
            if recache == "cut" and first >= self.sink_frames:
                self._jumps.append((first, self.cut_frames))
            return self.next_chunk
        self.cache.make_room(self.schedule.chunk_frames)
        resident = self.cache.resident()
        renewed = [frame for frame in resident if recache == "all" or frame >= self.sink_frames]
        for chunk in sorted({frame // self.schedule.chunk_frames for frame in renewed}):
            first = chunk * self.schedule.chunk_frames
            older = [frame for frame in resident if frame < first]
            _, new = self.forward(self.latents[chunk], self.schedule.clean_step, chunk, older)
            self.cache.commit(first, new, only=renewed)
        return self.next_chunk

    def _recache_jointly(self) -> None:
        """One forward on the latents of everything that attention sees, without a mask, the latest chunk included.

        Sinks are read and left as they are once there are more frames than the window holds; before, they are
        recomputed like all others, as in LongLive's code.
        """
        frames = self.schedule.chunk_frames
        made, chunks = self.next_chunk * frames, sorted({frame // frames for frame in self.cache.resident()})
        if self._pending is not None:
            self.latents[self.next_chunk - 1], self._pending = self._pending, None
            chunks.append(self.next_chunk - 1)
        protected: list[int] = []
        if self.window_frames is not None and made > self.window_frames:
            protected = [frame for frame in self.cache.resident() if frame < self.sink_frames]
            chunks = [chunk for chunk in chunks if chunk * frames >= self.sink_frames]
        latents = torch.cat([self.latents[chunk] for chunk in chunks], dim=1)
        _, new = self._forward(latents, self.schedule.clean_step, chunks, protected)
        for index, chunk in enumerate(chunks):
            self.cache.commit(chunk * frames, new, part=slice(index * frames, (index + 1) * frames))

    def position(self, frame: int) -> int:
        """Where a frame lies in time."""
        return frame + sum(distance for first, distance in self._jumps if frame >= first)

    @property
    def _attend(self) -> Callable[..., Tensor] | Sequence[Callable[..., Tensor]]:
        """The attention, over codes where the cache holds such."""
        if self.spec.kv is None:
            return self.attend
        if self.spec.products is not None:
            return hsa_attention_e4m3
        if callable(self.attend):
            return with_fp8_cache(self.attend)
        return [with_fp8_cache(attend) for attend in self.attend]

    def past(self, layer: int, chunk: int, frames: list[int] | None = None) -> LayerKV:
        """Keys, values and block means that `chunk` sees in `layer`: those of `frames`, by default all resident."""
        resident = self.cache.resident()
        recent = [frame for frame in resident if frame >= self.sink_frames]
        # A sink that is recomputed does not push those before it out of the way.
        own = max(chunk * self.schedule.chunk_frames, len(resident))
        # A cut lies between what is left, sinks among it, and what follows.
        first_recent = self.position(recent[0]) if recent else self.position(own - 1) + 1
        seen = resident if frames is None else frames
        return self.cache.past(layer, seen, first_recent, self._sees_virtual(chunk))

    def pinned(self, frames: list[int], chunk: int) -> int:
        """How many of the past frames `chunk` sees whole: sinks among `frames`, and virtual ones."""
        virtual = len(self.cache.virtual) if self._sees_virtual(chunk) else 0
        return sum(frame < self.sink_frames for frame in frames) + virtual

    def _sees_virtual(self, chunk: int) -> bool:
        """Whether the persistent set lies wholly before a chunk, which may be one that is recomputed."""
        return chunk * self.schedule.chunk_frames >= self.cache.gone

    def forward(
        self, x: Tensor, row: int, chunk: int, past_frames: list[int] | None = None
    ) -> tuple[Tensor, list[LayerKV]]:
        """The forward of a chunk in a row of the schedule: (flow `[channels, frames, h, w]`, new keys and values per
        layer).
        """
        return self._forward(x, row, [chunk], self.cache.resident() if past_frames is None else past_frames)

    def _forward(
        self, x: Tensor, row: int, chunks: Sequence[int], frames: list[int]
    ) -> tuple[Tensor, list[LayerKV]]:
        """The same for several chunks, which all see each other."""
        config, count, chunk = self.model.config, self.schedule.chunk_frames, chunks[-1]
        positions = torch.tensor([self.position(c * count + index) for c in chunks for index in range(count)])
        cos, sin = rope_tables(positions, self.grid, config.head_dim, theta=config.rope_theta)
        past = [self.past(layer, chunk, frames) for layer in range(config.layers)]
        core = CachedAttention(
            self.spec,
            cos,
            sin,
            past,
            torch.arange(len(past[0][0]), dtype=torch.int32),
            chunk,
            attend=self._attend,
            pinned=self.pinned(frames, chunk),
        )
        t = torch.full((1, len(positions)), self.schedule.row_timesteps[row], dtype=torch.float64)
        with torch.no_grad():
            flow = self.model(x[None], t, self.cross, core)[0]
        self.queries = core.queries
        return flow, core.new

    def following_noise(self, chunk: int, row: int) -> Tensor:
        """What the prediction of a denoising forward is re-noised with; zeros behind the last."""
        position = self.schedule.rows(chunk).index(row)
        is_last = row == self.schedule.rows(chunk)[-1]
        return torch.zeros_like(self.noise(chunk, 0)) if is_last else self.noise(chunk, position + 1)

    def step(self, x: Tensor, row: int, chunk: int) -> tuple[Tensor, Tensor, list[LayerKV]]:
        """One denoising forward and scheduler step: (next latent, x0, new keys and values per layer), latents float32;
        x0 in float64 inside.
        """
        flow, new = self.forward(x, row, chunk)
        x0 = (x.double() - self.schedule.row_sigmas[row] * flow.double()).float()
        sigma = self.schedule.row_following[row]
        return (1 - sigma) * x0 + sigma * self.following_noise(chunk, row), x0, new

    def _commit_pending(self) -> None:
        if self._pending is None:
            return
        self.commit(self._pending, self.next_chunk - 1)
        self._pending = None

    def commit(self, x0: Tensor, chunk: int) -> None:
        """Run the clean pass of `chunk` on its latents and cache what it leaves."""
        _, new = self.forward(x0, self.schedule.clean_step, chunk)
        self.keep(x0, chunk, new)

    def keep(self, x0: Tensor, chunk: int, new: list[LayerKV]) -> None:
        """Cache keys and values of `chunk`, whose clean latents are `x0`; `queries` are those of the same forward."""
        if self.persistent is not None:
            self._persist(self.persistent, chunk, new)
        self.cache.commit(chunk * self.schedule.chunk_frames, new)
        self.latents[chunk] = x0

    def _persist(self, persistent: PersistentSet, chunk: int, new: list[LayerKV]) -> None:
        """Evict what a chunk pushes out of the window, but for the blocks that the chunk looks at most."""
        cache, geometry = self.cache, self.spec.geometry
        # The next chunk needs the room of this one.
        leaving = cache.leaving(2 * self.schedule.chunk_frames)
        if not leaving:
            return
        candidates = [*cache.virtual, *(cache.frames[frame] for frame in leaving)]
        kept = min(persistent.frames, len(candidates))
        # Virtual frames lie behind the sinks, and those that leave behind them.
        sinks = sum(frame < self.sink_frames for frame in cache.frames)
        columns = slice(sinks * geometry.k_blocks, (sinks + len(candidates)) * geometry.k_blocks)
        layers = []
        for layer in range(self.model.config.layers):
            frames = [entry[layer] for entry in candidates]
            if kept < len(frames):
                means = torch.cat((self.past(layer, chunk)[2], new[layer][2]))
                weights = block_weights(self.queries[layer], means, self.spec.scale)
                frames = persistent.contest(frames, kept, persistent.scores(weights)[:, columns], geometry)
            layers.append(frames)
        cache.virtual = [list(entry) for entry in zip(*layers, strict=True)]
        cache.gone = leaving[-1] + 1
        for frame in leaving:
            del cache.frames[frame]

    def generate_chunk(self) -> Tensor:
        """Clean latents of the next chunk, `[channels, chunk_frames, h, w]` float32."""
        self._commit_pending()
        self.cache.make_room(self.schedule.chunk_frames)
        chunk = self.next_chunk
        x = self.noise(chunk, 0)
        for row in self.schedule.rows(chunk):
            x, _, new = self.step(x, row, chunk)
        if self.schedule.clean_forward:
            self._pending = x
        else:
            self.keep(x, chunk, new)
        self.next_chunk += 1
        return x

    def give_chunk(self, latents: Tensor) -> None:
        """Take the next chunk's clean latents `[channels, chunk_frames, h, w]` as they are, in place of denoising."""
        self._commit_pending()
        self.cache.make_room(self.schedule.chunk_frames)
        self._pending = latents
        self.next_chunk += 1

    def stream(self, chunks: int) -> Iterator[Tensor]:
        """Generate `chunks` more chunks."""
        for _ in range(chunks):
            yield self.generate_chunk()
