"""SLA (arXiv 2509.24006): the blocks whose mean key, less the mean of all, fits best, and a linear branch beside them.

The linear branch is as in the public code's main branch (github.com/thu-ml/SLA), of 2025: over all keys, not only
those of blocks that the sparse branch leaves out, as an earlier release had it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightforcing_ref.attention import hsa_attention, hsa_selection, lowest_index_top, token_blocks
from lightforcing_ref.sparsity import HSAConfig

from .attention import resident
from .view import View, budget, check_fraction

__all__ = ["SLA", "SparseLinearAttention", "linear_branch"]

_ONE_STAGE = HSAConfig(keep_frames=1 << 30, sink_frames=0, near_frames=0)
"""No cache holds as many frames, so that all stay eligible."""

_EPSILON = 1e-5
"""Beside the sum of weights, so that features that nothing shares give no division by zero."""


@dataclass(frozen=True)
class SLA:
    """Top blocks by the product of pooled queries and pooled mean-free keys, per head and query block.

    This is the sparse branch; `SparseLinearAttention` adds the linear one.

    Args:
        ratio: fraction of the resident key blocks to keep; None = the chunk's budget.
    """

    ratio: float | None = None

    def __post_init__(self) -> None:
        check_fraction("the ratio of SLA", self.ratio)

    def visible(self, view: View) -> Tensor:
        """Bool `[H, T, K]`."""
        query = view.q_mean.flatten(0, 1).transpose(0, 1)
        centred = view.k_mean.flatten(0, 1) - view.k.float().mean(0)
        scores = query @ centred.permute(1, 2, 0)
        return view.spread(lowest_index_top(scores, budget(view, self.ratio)))


def linear_branch(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Linear attention of q `[T, H, D]` over k, v `[K, H, D]` with softmax features, projected; in float32.

    With phi the softmax over D, `o = phi(q) sum(phi(k)^T v) / (1e-5 + phi(q) . sum(phi(k)))`, and the result is
    `weight o + bias`, the same for every head.

    Args:
        weight: `[D, D]`, output features first.
        bias: `[D]`.

    Returns:
        float32 `[T, H, D]`.
    """
    query, key = (x.float().softmax(-1).transpose(0, 1) for x in (q, k))
    state = key.transpose(1, 2) @ v.float().transpose(0, 1)  # [H, D, D]
    total = query @ key.sum(1)[..., None]
    mixed = (query @ state) / (_EPSILON + total)
    return (mixed @ weight.float().T + bias.float()).transpose(0, 1)


@dataclass(frozen=True)
class SparseLinearAttention:
    """Both branches of SLA as an operator: called as `hsa_attention` is, with weight and bias of the projection last.

    The sparse branch is one stage of hierarchical selection, which chooses as `SLA` does. The linear branch runs in
    every chunk, the first one included, over the frames that the cache shows and the chunk.

    Args:
        form: of the sparse branch, as `hsa_attention` takes it.
    """

    form: Literal["mask", "gather"] = "mask"

    def __call__(self, *tensors: Tensor, **attributes: Any) -> Tensor:
        """`[T, H, D]` in the type of `q`: the sparse branch rounded to it, then the sum of both."""
        *shared, weight, bias = tensors
        q, k, v, _, _, past_k, past_v, _, frame_slots, _ = shared
        attributes |= {"keep_frames": _ONE_STAGE.keep_frames, "sink_frames": 0, "near_frames": 0}
        attended = hsa_attention(*shared, **attributes, form=self.form)
        keys, values = resident(past_k, k, frame_slots), resident(past_v, v, frame_slots)
        return (attended.float() + linear_branch(q, keys, values, weight, bias)).to(q.dtype)

    def visible(
        self, *tensors: Tensor, frame_tokens: int, block_q: int, block_k: int, **attributes: Any
    ) -> Tensor:
        """What each query sees of the resident keys in the sparse branch, bool `[H, T, K]`; as for a call."""
        q, _, _, q_mean, k_mean, _, _, past_kmean, frame_slots, chunk, _, _ = tensors
        slots = frame_slots[frame_slots >= 0].long()
        selected = hsa_selection(
            q_mean,
            torch.cat((past_kmean[slots], k_mean)),
            past_frames=slots.numel(),
            chunk=int(chunk),
            hsa=_ONE_STAGE,
            keep_q20=attributes["keep_q20"],
        )
        keys = (slots.numel() + k_mean.shape[0]) * frame_tokens
        row = token_blocks(q.shape[0], frame_tokens, block_q, q.device)
        column = token_blocks(keys, frame_tokens, block_k, q.device)
        return selected[:, row][:, :, column]
