"""Attention under a policy, in the place of the hierarchical sparse attention operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightforcing_ref.attention import dense_attention
from lightforcing_ref.errors import ConfigError
from lightforcing_ref.sparsity import BlockGeometry

from .view import Policy, View

__all__ = ["PolicyAttention", "resident"]


def resident(past: Tensor, current: Tensor, frame_slots: Tensor) -> Tensor:
    """Rows of the past frames, oldest first, and of the chunk, `[K, H, D]`.

    Args:
        past: `[slots, frame_tokens, H, D]`; slots that `frame_slots` does not name are not read.
        current: `[T, H, D]`.
    """
    return torch.cat((past[frame_slots[frame_slots >= 0].long()].flatten(0, 1), current))


@dataclass(frozen=True)
class PolicyAttention:
    """The attention operator with `policy` in front; give it to `Rollout` as `attend`.

    The first chunk, which has no past, is dense under every policy, as the chunk-aware budgets have it.

    Args:
        grid: rows and columns of a frame's tokens.
    """

    policy: Policy
    grid: tuple[int, int]

    def __call__(self, *tensors: Tensor, scale: float, **attributes: Any) -> Tensor:
        """As `hsa_attention`, perhaps with `pinned` behind its tensors; the attributes of its two stages
        (`keep_frames` and so on) are not looked at.

        Raises:
            ConfigError: the grid does not hold `frame_tokens` tokens.
        """
        self._require_grid(attributes["frame_tokens"])
        q, k, v, _, _, past_k, past_v, _, frame_slots, *_ = tensors
        keys, values = resident(past_k, k, frame_slots), resident(past_v, v, frame_slots)
        if len(keys) == len(k):
            return dense_attention(q, keys, values, scale)
        return dense_attention(q, keys, values, scale, self.visible(*tensors, **attributes))

    def visible(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_mean: Tensor,
        k_mean: Tensor,
        past_k: Tensor,
        past_v: Tensor,
        past_kmean: Tensor,
        frame_slots: Tensor,
        chunk: Tensor | int,
        pinned: Tensor | int = 0,
        *,
        frame_tokens: int,
        block_q: int,
        block_k: int,
        keep_q20: Sequence[int],
        **_: object,
    ) -> Tensor:
        """What each query sees of the resident keys, bool `[H, T, K]`; arguments and errors as for a call.

        Raises:
            ConfigError: the grid is not a frame's.
        """
        self._require_grid(frame_tokens)
        slots = frame_slots[frame_slots >= 0].long()
        keys = resident(past_k, k, frame_slots)
        if slots.numel() == 0:
            return torch.ones(q.shape[1], q.shape[0], len(keys), dtype=torch.bool, device=q.device)
        view = View(
            q=q,
            k=keys,
            q_mean=q_mean,
            k_mean=torch.cat((past_kmean[slots], k_mean)),
            past_frames=slots.numel(),
            chunk=int(chunk),
            grid=self.grid,
            geometry=BlockGeometry(frame_tokens, block_q, block_k),
            keep_q20=tuple(keep_q20),
            pinned=int(pinned),
        )
        return self.policy.visible(view).expand(q.shape[1], -1, -1)

    def _require_grid(self, frame_tokens: int) -> None:
        if self.grid[0] * self.grid[1] != frame_tokens:
            raise ConfigError(
                f"the grid {self.grid[0]}x{self.grid[1]} holds {self.grid[0] * self.grid[1]} tokens; expected the "
                f"{frame_tokens} of a frame"
            )
