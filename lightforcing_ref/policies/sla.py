"""The sparse branch of SLA (arXiv 2509.24006): the blocks whose mean key, less the mean of all, fits best."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightforcing_ref.attention import lowest_index_top

from .view import View, budget, check_fraction

__all__ = ["SLA"]


@dataclass(frozen=True)
class SLA:
    """Top blocks by the product of pooled queries and pooled mean-free keys, per head and query block.

    The linear branch, which covers the other blocks, needs a projection that is trained for it; checkpoints without
    one run the sparse branch alone.

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
