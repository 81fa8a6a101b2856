"""The reference key-value cache: sink frames, a window of recent frames, and the chunk in flight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .config import DiTConfig
from .fp8_cache import KVFormat, Products, dequantize_blocks, oracles, quantize_blocks
from .model import QKVParams
from .rope import apply_rope, rope_angles
from .sparsity import BlockGeometry, HSAConfig

__all__ = [
    "AttentionSpec",
    "CachedAttention",
    "FrameCache",
    "KVFormat",
    "LayerKV",
    "Products",
    "SinkPositions",
]

SinkPositions = Literal["absolute", "window"]
"""Where sink frames sit: at their own positions (LongLive), or just before the window (Light Forcing long)."""

LayerKV = tuple[Tensor, ...]
"""Keys, values and key block means of one layer; behind them, where they are codes, the scales of both.

Values that are codes lie block by block, `[..., blocks, H, D, block]`."""


@dataclass(frozen=True)
class AttentionSpec:
    """Constants of the self-attention of one model variant; `kv` and `products` None = in the compute type.

    With `persistent_frames`, the most virtual frames that a persistent set fills, attention is told what is pinned;
    with `linear_branch`, it is given the layer's projection of SLA's linear branch.
    """

    heads: int
    geometry: BlockGeometry
    hsa: HSAConfig
    keep_q20: tuple[int, ...]
    scale: float
    kv: KVFormat | None = None
    products: Products | None = None
    persistent_frames: int = 0
    linear_branch: bool = False

    def prepare_attributes(self) -> dict[str, int]:
        """Integer attributes of QKPrepare."""
        geometry = self.geometry
        return {
            "heads": self.heads,
            "frame_tokens": geometry.frame_tokens,
            "block_q": geometry.block_q,
            "block_k": geometry.block_k,
        }

    def attend_attributes(self) -> dict[str, int | float | list[int]]:
        """Attributes of HierarchicalSparseAttention."""
        return {
            "frame_tokens": self.geometry.frame_tokens,
            "block_q": self.geometry.block_q,
            "block_k": self.geometry.block_k,
            "keep_frames": self.hsa.keep_frames,
            "sink_frames": self.hsa.sink_frames,
            "near_frames": self.hsa.near_frames,
            "scale": self.scale,
            "keep_q20": list(self.keep_q20),
        }


@dataclass
class CachedAttention:
    """A `SelfAttentionCore` that attends to cached frames and collects the chunk's own keys and values.

    `prepare` and `attend` are the two operators, those over codes where `spec.kv` says so: the oracle by default,
    exportable ones when tracing. `attend` is one for all layers, or one for each.

    Args:
        cos, sin: float32 `[T, D/2]` of the chunk.
        past: per layer what `LayerKV` lists, each with frame slots first.
        frame_slots: int32 `[F]`.
        chunk: index into the sparsity table; a 0-dim tensor when tracing.
        pinned: oldest past frames that everybody sees, likewise; for attention with a persistent set.
    """

    spec: AttentionSpec
    cos: Tensor
    sin: Tensor
    past: Sequence[LayerKV]
    frame_slots: Tensor
    chunk: Tensor | int
    prepare: Callable[..., tuple[Tensor, ...]] | None = None
    attend: Callable[..., Tensor] | Sequence[Callable[..., Tensor]] | None = None
    pinned: Tensor | int = 0
    new: list[LayerKV] = field(default_factory=list)
    """Per layer what `LayerKV` lists of the chunk: keys and values `[T, H, D]`, the rest with frames first."""
    queries: list[Tensor] = field(default_factory=list)
    """Per layer, query block means `[frames, blocks, H, D]` of the chunk."""

    def __post_init__(self) -> None:
        prepare, attend = oracles(self.spec.kv, self.spec.products)
        self.prepare, self.attend = self.prepare or prepare, self.attend or attend

    def __call__(self, layer: int, qkv: Tensor, params: QKVParams) -> Tensor:
        assert self.prepare is not None and self.attend is not None
        q, k, v, q_mean, *rest = self.prepare(
            qkv[0],
            params.bias,
            params.norm_q,
            params.norm_k,
            self.cos,
            self.sin,
            **self.spec.prepare_attributes(),
            eps=params.eps,
        )
        self.new.append((k, v, *rest))
        self.queries.append(q_mean)
        attend = self.attend if callable(self.attend) else self.attend[layer]
        out = attend(
            q,
            k,
            v,
            q_mean,
            *rest,
            *self.past[layer],
            self.frame_slots,
            self.chunk,
            *((self.pinned,) if self.spec.persistent_frames else ()),
            *(params.linear if self.spec.linear_branch else ()),
            **self.spec.attend_attributes(),
        )
        return out.flatten(1)[None]


@dataclass
class FrameCache:
    """Keys and values of past frames, one entry per frame and layer, oldest first.

    Virtual frames, which a persistent set fills with blocks of evicted frames, come behind the sinks. They have no
    index, and their keys stay roped where their blocks were.

    Keys are stored roped at absolute positions. With `sink_positions="window"` the sink frames are shown to the
    model at the positions just before the oldest recent frame, which reproduces upstream's window-relative
    positions (RoPE is relative): their keys are rotated from the copy stored at commit.

    Args:
        window_frames: frames visible to a chunk, sink and current chunk included, virtual ones not; None = unlimited.
        sink_frames: oldest frames that are never evicted.
    """

    config: DiTConfig
    geometry: BlockGeometry
    window_frames: int | None
    sink_frames: int
    sink_positions: SinkPositions = "absolute"
    kv: KVFormat | None = None
    frames: dict[int, list[LayerKV]] = field(default_factory=dict)
    """Absolute frame index -> per layer (k `[FT, H, D]`, v `[FT, H, D]`, means `[blocks, H, D]`; if they are codes, v
    `[blocks, H, D, block]` and scales `[blocks, H]` of both)."""
    virtual: list[list[LayerKV]] = field(default_factory=list)
    """The persistent set: virtual frames in the form of `frames`."""
    gone: int = 0
    """The set holds blocks of frames below this one."""

    def resident(self) -> list[int]:
        """Absolute indices of the cached frames, oldest first."""
        return sorted(self.frames)

    def make_room(self, frames: int) -> None:
        """Evict the oldest non-sink frames until `frames` more fit into the window."""
        for frame in self.leaving(frames):
            del self.frames[frame]

    def leaving(self, frames: int) -> list[int]:
        """The frames that leave where `frames` more are to fit into the window."""
        if self.window_frames is None:
            return []
        evictable = [frame for frame in self.resident() if frame >= self.sink_frames]
        return evictable[: max(0, len(self.frames) + frames - self.window_frames)]

    def flush(self, keep: int) -> None:
        """Forget all frames but the sinks and the latest `keep`, and the persistent set."""
        recent = [frame for frame in self.resident() if frame >= self.sink_frames]
        for frame in recent[: max(0, len(recent) - keep)]:
            del self.frames[frame]
        self.virtual.clear()

    def commit(
        self,
        first_frame: int,
        new: Sequence[LayerKV],
        *,
        only: Sequence[int] | None = None,
        part: slice = slice(None),
    ) -> None:
        """Store the frames of a chunk that starts at `first_frame`.

        Args:
            only: which frames; None = all.
            part: where in `new` the chunk's frames are.
        """
        count = new[0][2].shape[0]
        for frame, index in enumerate(range(count)[part], start=first_frame):
            if only is None or frame in only:
                self.frames[frame] = [self._frame(layer, index) for layer in new]

    def _frame(self, new: LayerKV, index: int) -> LayerKV:
        """One of the frames of a chunk."""
        k, v, *rest = new
        tokens = slice(index * self.geometry.frame_tokens, (index + 1) * self.geometry.frame_tokens)
        return k[tokens], v[tokens] if self.kv is None else v[index], *(blocks[index] for blocks in rest)

    def past(self, layer: int, frames: Sequence[int], first_recent: int, virtual: bool = False) -> LayerKV:
        """Stacked keys, values and means of `frames`, and of the virtual ones behind the sinks if these are wanted.

        Args:
            first_recent: oldest visible frame that is no sink (the chunk's own first frame if there is none);
                sinks with window positions sit just before it.
        """
        sinks = sum(frame < self.sink_frames for frame in self.frames)
        found = [self.frames[frame][layer] for frame in frames if frame < self.sink_frames]
        if self.sink_positions == "window":
            found = [self._turned(entry, first_recent - sinks) for entry in found]
        if virtual:
            found += [entry[layer] for entry in self.virtual]
        found += [self.frames[frame][layer] for frame in frames if frame >= self.sink_frames]
        if found:
            return tuple(torch.stack(parts) for parts in zip(*found, strict=True))
        heads, tokens, blocks = (
            (self.config.heads, self.config.head_dim),
            self.geometry.frame_tokens,
            self.geometry.k_blocks,
        )
        means = torch.zeros(0, blocks, *heads)
        if self.kv is None:
            return (*2 * (torch.zeros(0, tokens, *heads),), means)
        keys = torch.zeros(0, tokens, *heads, dtype=torch.uint8)
        values = torch.zeros(0, blocks, *heads, self.geometry.block_k, dtype=torch.uint8)
        return (keys, values, means, *2 * (torch.zeros(0, blocks, heads[0]),))

    def _turned(self, entry: LayerKV, frames: int) -> LayerKV:
        """A sink frame as it is at another temporal position; codes of its keys are rounded a second time."""
        k, v, mean, *scales = entry
        if self.kv is None:
            return self._shift(k, frames), v, self._shift(mean, frames)
        block = self.geometry.block_k
        # A rotation turns a key less its mean into the turned key less the turned mean.
        turned = self._shift(dequantize_blocks(k[None], scales[0][None], block)[0], frames)
        codes, scale = quantize_blocks(turned[None], block)
        return codes[0], v, self._shift(mean, frames), scale[0], scales[1]

    def _shift(self, x: Tensor, frames: int) -> Tensor:
        """Rotate `x` `[rows, H, D]` by `frames` in time; all rows lie in one frame, so one rotation serves all."""
        angles = rope_angles(
            torch.tensor([frames]), (1, 1), self.config.head_dim, theta=self.config.rope_theta
        )
        return apply_rope(x.float(), angles.cos().float(), angles.sin().float()).to(x.dtype)
