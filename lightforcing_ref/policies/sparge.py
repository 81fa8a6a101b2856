"""SpargeAttn (arXiv 2502.18137): blocks by pooled weights, and every block that its mean does not stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightforcing_ref.attention import lowest_index_top
from lightforcing_ref.errors import ConfigError

from .view import View, budget, check_fraction

__all__ = ["SpargeAttention"]


@dataclass(frozen=True)
class SpargeAttention:
    """Top blocks of the softmax over pooled queries and keys; the number differs from row to row.

    A block is *similar* if the mean cosine of all its pairs of tokens exceeds `similarity`. Key blocks that are not
    are seen by everybody, and query blocks that are not see everything.

    Args:
        mode: "top-k" keeps a number of blocks, "cdf" the smallest set whose weights add up to more than `cumulative`.
        ratio: in mode "top-k", the fraction of the resident key blocks; None = the chunk's budget.
        cumulative: in mode "cdf".
        similarity: below 0, as the authors' own for top-k, every block is similar.
        smooth: subtract the mean of all resident keys first, which the softmax does not see, but the cosines do.
    """

    mode: Literal["top-k", "cdf"] = "top-k"
    ratio: float | None = None
    cumulative: float = 0.98
    similarity: float = -0.1
    smooth: bool = True

    def __post_init__(self) -> None:
        if self.mode not in ("top-k", "cdf"):
            raise ConfigError(f"the mode of SpargeAttn is {self.mode!r}; expected 'top-k' or 'cdf'")
        check_fraction("the ratio of SpargeAttn", self.ratio)
        if not 0 < self.cumulative <= 1:
            raise ConfigError(f"the cumulative threshold is {self.cumulative}; expected a value in (0, 1]")

    def visible(self, view: View) -> Tensor:
        """Bool `[H, T, K]`."""
        shift = view.k.float().mean(0) if self.smooth else torch.zeros_like(view.k[0], dtype=torch.float32)
        query = view.q_mean.flatten(0, 1).transpose(0, 1)
        keys = (view.k_mean.flatten(0, 1) - shift).permute(1, 2, 0)
        own = self._similar(view.q.float(), view.query_blocks(), query.shape[1])
        others = self._similar(view.k.float() - shift, view.key_block_index(), view.key_blocks)[:, None]
        scores = (query @ keys) * view.q.shape[-1] ** -0.5
        # Where no block is similar the row is undefined, and all blocks are kept below.
        weights = scores.masked_fill(~others, -torch.inf).softmax(-1).nan_to_num()
        if self.mode == "top-k":
            kept = lowest_index_top(weights, budget(view, self.ratio))
        else:
            kept = self._cumulative(weights)
        return view.spread(kept | ~others | ~own[..., None])

    def _cumulative(self, weights: Tensor) -> Tensor:
        order = weights.sort(dim=-1, descending=True, stable=True)
        before = order.values.cumsum(-1) - order.values
        return torch.zeros_like(weights, dtype=torch.bool).scatter_(
            -1, order.indices, before <= self.cumulative
        )

    def _similar(self, tokens: Tensor, block: Tensor, blocks: int) -> Tensor:
        """Which blocks of `tokens` `[n, H, D]` are similar, `[H, blocks]`: the square of the mean unit vector."""
        units = F.normalize(tokens, dim=-1)
        sums = torch.zeros(blocks, *units.shape[1:], device=units.device).index_add_(0, block, units)
        sizes = torch.bincount(block, minlength=blocks)
        return (sums.square().sum(-1) / sizes[:, None] ** 2 > self.similarity).transpose(0, 1)
