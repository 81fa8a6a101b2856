"""Sparse Forcing (PBSA, arXiv 2604.21221): key blocks that outlive the window, and the best ones of what is recent.

Its two halves: `PersistentBlocks` says what a query sees, `PersistentSet` which blocks of evicted frames stay. These
lie packed in *virtual frames*, which the cache holds and shows as it does frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightforcing_ref.attention import lowest_index_top
from lightforcing_ref.errors import ConfigError
from lightforcing_ref.sparsity import BlockGeometry, kept_blocks

from .view import View

__all__ = ["PersistentBlocks", "PersistentSet", "block_weights"]


@dataclass(frozen=True)
class PersistentBlocks:
    """Everything that is pinned (sinks and the persistent set), and the best blocks of the other frames.

    The budget counts the blocks of these others, the chunk's own among them.
    """

    def visible(self, view: View) -> Tensor:
        """Bool `[H, T, K]`."""
        query = view.q_mean.flatten(0, 1).transpose(0, 1)
        scores = query @ view.k_mean.flatten(0, 1).permute(1, 2, 0)
        pinned = view.pinned * view.geometry.k_blocks
        kept = kept_blocks(view.keep_q20, view.chunk, view.key_blocks - pinned)
        local = lowest_index_top(scores[..., pinned:], kept)
        seen = torch.ones_like(scores[..., :pinned], dtype=torch.bool)
        return view.spread(torch.cat((seen, local), dim=-1))


@dataclass(frozen=True)
class PersistentSet:
    """Which blocks outlive the window: the best of those that were kept before and those that leave now.

    Args:
        frames: size of the set, in frames' worth of blocks.
        heads: "own" = each head keeps blocks of its own, "shared" = all heads of a layer keep the same ones.
        score: what a block's weights in the committed chunk's query blocks amount to: their "sum", or their "peak".
    """

    frames: int = 6
    heads: Literal["own", "shared"] = "own"
    score: Literal["sum", "peak"] = "sum"

    def __post_init__(self) -> None:
        if self.frames < 1 or self.heads not in ("own", "shared") or self.score not in ("sum", "peak"):
            raise ConfigError(
                f"the persistent set has frames {self.frames}, heads {self.heads!r} and score {self.score!r}; expected "
                "at least 1, 'own' or 'shared', and 'sum' or 'peak'"
            )

    def scores(self, weights: Tensor) -> Tensor:
        """The score of every block and head, `[H, K]`, from `block_weights`."""
        scores = weights.sum(1) if self.score == "sum" else weights.amax(1)
        return scores if self.heads == "own" else scores.sum(0, keepdim=True).expand_as(scores)

    def contest(
        self,
        frames: Sequence[tuple[Tensor, ...]],
        kept: int,
        scores: Tensor,
        geometry: BlockGeometry,
    ) -> list[tuple[Tensor, ...]]:
        """The first `kept` of `frames`, with the best blocks of all of them.

        Blocks compete with those of their size, so that a virtual frame has a frame's shape: where the last block of a
        frame is shorter, the short ones among themselves. Equal scores go to the lower index. A block that stays in one
        of the first frames stays in its place; the places of those that do not are taken, in ascending order, by the
        chosen ones of the other frames, in ascending order.

        Args:
            frames: each one layer's keys and values `[frame_tokens, H, D]`, block means `[k_blocks, H, D]`, and
                whatever else there is of every block, `[k_blocks, ...]`.
            scores: `[H, frames * k_blocks]`.
        """
        result = [tuple(part.clone() for part in frame) for frame in frames[:kept]]
        whole = geometry.frame_tokens // geometry.block_k
        by_frame = scores.unflatten(1, (len(frames), geometry.k_blocks))
        for first, count in ((0, whole), (whole, geometry.k_blocks - whole)):
            if not count:
                continue
            best = lowest_index_top(by_frame[..., first : first + count].flatten(1), kept * count)
            for head, chosen in enumerate(best):
                places = (~chosen[: kept * count]).nonzero()[:, 0].tolist()
                taken = chosen[kept * count :].nonzero()[:, 0].tolist()
                for place, block in zip(places, taken, strict=True):
                    target, source = result[place // count], frames[kept + block // count]
                    _copy(
                        target, first + place % count, source, first + block % count, head, geometry.block_k
                    )
        return result


def block_weights(q_mean: Tensor, k_mean: Tensor, scale: float) -> Tensor:
    """Attention between blocks: softmax of the scaled products of their means, over all key blocks.

    Args:
        q_mean: float32 `[frames, q_blocks, H, D]`.
        k_mean: float32 `[resident frames, k_blocks, H, D]`.

    Returns:
        `[H, query blocks, key blocks]`.
    """
    query, keys = (mean.flatten(0, 1).transpose(0, 1) for mean in (q_mean, k_mean))
    return (scale * (query @ keys.transpose(1, 2))).softmax(-1)


def _copy(
    target: tuple[Tensor, ...], place: int, source: tuple[Tensor, ...], block: int, head: int, size: int
) -> None:
    """Overwrite one head's block of a frame by one of another frame; both are of the same size."""
    for number, (into, of) in enumerate(zip(target, source, strict=True)):
        if number < 2:  # keys and values are tokens
            rows = of[block * size : (block + 1) * size, head]
            into[place * size : place * size + len(rows), head] = rows
        else:
            into[place, head] = of[block, head]
