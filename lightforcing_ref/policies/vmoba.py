"""VMoBA (arXiv 2506.23858): every token chooses among blocks in time, in space, or in both, by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightforcing_ref.attention import lowest_index_top
from lightforcing_ref.errors import ConfigError

from .view import View

__all__ = ["VMoBA"]


@dataclass(frozen=True)
class VMoBA:
    """The blocks whose mean key fits a token's own query best, and always the block that the token lies in.

    Args:
        block: frames, rows and columns of a block; None = all there are. The method alternates by layer between
            (t, None, None), (None, h, w) and (t, h, w): give `Rollout` one operator for each layer. Blocks are
            counted from the oldest resident frame; the last one on an axis is smaller where it does not divide.
        mode: "top-k" keeps `top` blocks, the token's own among them; "threshold" adds blocks, best first, until the
            kept share of the scores, stretched to 0..1 for each token, reaches `threshold`.
    """

    block: tuple[int | None, int | None, int | None] = (3, None, None)
    mode: Literal["top-k", "threshold"] = "threshold"
    top: int = 3
    threshold: float = 0.25

    def __post_init__(self) -> None:
        if len(self.block) != 3 or any(size is not None and size < 1 for size in self.block):
            raise ConfigError(
                f"the block is {self.block}; expected positive (frames, rows, columns), or none for all of an axis"
            )
        if self.mode not in ("top-k", "threshold") or self.top < 1 or not 0 < self.threshold <= 1:
            raise ConfigError(
                f"mode, top and threshold are {self.mode!r}, {self.top} and {self.threshold}; expected 'top-k' or "
                "'threshold', at least 1, and a share in (0, 1]"
            )

    def visible(self, view: View) -> Tensor:
        """Bool `[H, T, K]`."""
        block = self._block_index(view)
        count = int(block.max()) + 1
        keys = view.k.float()
        sums = torch.zeros(count, *keys.shape[1:], device=keys.device).index_add_(0, block, keys)
        means = sums / torch.bincount(block, minlength=count)[:, None, None]
        scores = view.q.float().transpose(0, 1) @ means.permute(1, 2, 0)  # [H, T, count]
        own = torch.zeros_like(scores, dtype=torch.bool)
        own[:, torch.arange(own.shape[1]), block[-own.shape[1] :]] = True
        kept = self._top(scores, own) if self.mode == "top-k" else self._threshold(scores, own)
        return kept[..., block]

    def _block_index(self, view: View) -> Tensor:
        """Block of each resident token, `[K]`."""
        rows, columns = view.grid
        place = torch.arange(rows * columns, device=view.k.device).repeat(view.frames)
        index = torch.zeros_like(place)
        axes = (view.key_frames(), place // columns, place % columns)
        for axis, size, extent in zip(axes, self.block, (view.frames, rows, columns), strict=True):
            step = extent if size is None else size
            index = index * -(-extent // step) + axis // step
        return index

    def _top(self, scores: Tensor, own: Tensor) -> Tensor:
        return lowest_index_top(scores.masked_fill(own, torch.inf), min(self.top, scores.shape[-1]))

    def _threshold(self, scores: Tensor, own: Tensor) -> Tensor:
        low, high = scores.aminmax(dim=-1, keepdim=True)
        # Equal scores share alike.
        weights = torch.where(high > low, (scores - low) / (high - low), torch.ones_like(scores)).double()
        order = weights.masked_fill(own, torch.inf).sort(dim=-1, descending=True, stable=True).indices
        sorted_weights = weights.gather(-1, order)
        before = sorted_weights.cumsum(-1) - sorted_weights
        enough = before >= self.threshold * weights.sum(-1, keepdim=True)
        enough[..., 0] = False  # the token's own block
        return torch.zeros_like(own).scatter_(-1, order, ~enough)
