"""What a policy looks at, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightforcing_ref.attention import token_blocks
from lightforcing_ref.errors import ConfigError
from lightforcing_ref.sparsity import BlockGeometry, kept_blocks

__all__ = ["Policy", "View", "budget", "check_fraction"]


@dataclass(frozen=True)
class View:
    """One layer's attention of one chunk: N = past + current frames are resident, oldest first.

    Attributes:
        q: `[T, H, D]`, the current chunk, normed and roped.
        k: `[N * frame_tokens, H, D]`, past and current.
        q_mean, k_mean: float32 `[frames, blocks, H, D]` block means of `q` and `k`.
        past_frames: resident frames before the chunk; their order stands for their time, so that after an eviction
            the sink frames are as near as if nothing had lain in between.
        chunk: index into `keep_q20`.
        grid: rows and columns of a frame's tokens.
        pinned: oldest resident frames that everybody sees whole, for the method that asks.
    """

    q: Tensor
    k: Tensor
    q_mean: Tensor
    k_mean: Tensor
    past_frames: int
    chunk: int
    grid: tuple[int, int]
    geometry: BlockGeometry
    keep_q20: tuple[int, ...]
    pinned: int = 0

    @property
    def frames(self) -> int:
        """N: resident frames, past and current."""
        return self.k_mean.shape[0]

    @property
    def key_blocks(self) -> int:
        """Resident key blocks."""
        return self.frames * self.geometry.k_blocks

    def query_frames(self) -> Tensor:
        """Index among the resident frames of each query's frame, `[T]`."""
        tokens = torch.arange(self.q.shape[0], device=self.q.device)
        return self.past_frames + tokens // self.geometry.frame_tokens

    def key_frames(self) -> Tensor:
        """Index of each key's frame, `[N * frame_tokens]`."""
        return torch.arange(self.k.shape[0], device=self.k.device) // self.geometry.frame_tokens

    def query_blocks(self) -> Tensor:
        """Query block of each query, `[T]`."""
        geometry = self.geometry
        return token_blocks(self.q.shape[0], geometry.frame_tokens, geometry.block_q, self.q.device)

    def key_block_index(self) -> Tensor:
        """Key block of each key, `[N * frame_tokens]`."""
        geometry = self.geometry
        return token_blocks(self.k.shape[0], geometry.frame_tokens, geometry.block_k, self.k.device)

    def spread(self, blocks: Tensor) -> Tensor:
        """A block map bool `[H, query blocks, key blocks]` as a map of tokens, `[H, T, N * frame_tokens]`."""
        return blocks[:, self.query_blocks()][:, :, self.key_block_index()]


class Policy(Protocol):
    """Which keys each query sees."""

    def visible(self, view: View) -> Tensor:
        """Bool `[H or 1, T, N * frame_tokens]`; every query sees at least one key."""


def budget(view: View, fraction: float | None) -> int:
    """Key blocks to keep: `int(fraction * resident)`, at least one; by the table where `fraction` is None."""
    if fraction is None:
        return kept_blocks(view.keep_q20, view.chunk, view.key_blocks)
    return max(1, int(fraction * view.key_blocks))


def check_fraction(name: str, value: float | None) -> None:
    """Refuse a kept fraction that is none.

    Raises:
        ConfigError: `value` is given and lies outside (0, 1].
    """
    if value is not None and not 0 < value <= 1:
        raise ConfigError(
            f"{name} is {value}; expected a kept fraction in (0, 1], or none for the chunk's budget"
        )
