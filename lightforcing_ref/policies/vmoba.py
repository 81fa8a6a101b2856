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
        pooled: tokens that choose together, by their mean query; None = every token by itself. A frame's tokens, patch
            by patch in raster order, are cut into runs of so many. What any of a run lies in is its own.
    """

    block: tuple[int | None, int | None, int | None] = (3, None, None)
    mode: Literal["top-k", "threshold"] = "threshold"
    top: int = 3
    threshold: float = 0.25
    pooled: int | None = None

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
        if self.pooled is not None and self.pooled < 1:
            raise ConfigError(f"{self.pooled} tokens choose together; expected at least 1, or none")

    def visible(self, view: View) -> Tensor:
        """Bool `[H, T, K]`."""
        block = self._block_index(view)
        count = int(block.max()) + 1
        keys = view.k.float()
        sums = torch.zeros(count, *keys.shape[1:], device=keys.device).index_add_(0, block, keys)
        means = sums / torch.bincount(block, minlength=count)[:, None, None]
        run = self._runs(view)
        runs = int(run.max()) + 1
        queries = torch.zeros(runs, *keys.shape[1:], device=keys.device).index_add_(0, run, view.q.float())
        queries = queries / torch.bincount(run, minlength=runs)[:, None, None]
        scores = queries.transpose(0, 1) @ means.permute(1, 2, 0)  # [H, runs, count]
        own = torch.zeros_like(scores, dtype=torch.bool)
        own[:, run, block[-len(run) :]] = True
        kept = self._top(scores, own) if self.mode == "top-k" else self._threshold(scores, own)
        return kept[:, run][..., block]

    def _runs(self, view: View) -> Tensor:
        """Which queries choose together, `[T]`."""
        tokens = view.geometry.frame_tokens
        if self.pooled is None:
            return torch.arange(view.q.shape[0], device=view.q.device)
        order = self._patch(view).argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(tokens, device=order.device)
        of_frame = place // self.pooled
        frame = torch.arange(view.q.shape[0] // tokens, device=order.device)[:, None]
        return (frame * -(-tokens // self.pooled) + of_frame).flatten()

    def _patch(self, view: View) -> Tensor:
        """Patch of each token of a frame."""
        rows, columns = view.grid
        place = torch.arange(rows * columns, device=view.k.device)
        _, tall, wide = self.block
        tall, wide = tall or rows, wide or columns
        return place // columns // tall * -(-columns // wide) + place % columns // wide

    def _block_index(self, view: View) -> Tensor:
        """Block of each resident token, `[K]`."""
        patch = self._patch(view)
        time = view.key_frames() // (self.block[0] or view.frames)
        return time * (int(patch.max()) + 1) + patch.repeat(view.frames)

    def _top(self, scores: Tensor, own: Tensor) -> Tensor:
        kept = lowest_index_top(scores.masked_fill(own, torch.inf), min(self.top, scores.shape[-1]))
        return kept | own

    def _threshold(self, scores: Tensor, own: Tensor) -> Tensor:
        low, high = scores.aminmax(dim=-1, keepdim=True)
        # Equal scores share alike.
        weights = torch.where(high > low, (scores - low) / (high - low), torch.ones_like(scores)).double()
        order = weights.masked_fill(own, torch.inf).sort(dim=-1, descending=True, stable=True).indices
        sorted_weights = weights.gather(-1, order)
        before = sorted_weights.cumsum(-1) - sorted_weights
        enough = before >= self.threshold * weights.sum(-1, keepdim=True)
        return torch.zeros_like(own).scatter_(-1, order, ~enough) | own
