"""Sliding-tile attention (STA, arXiv 2502.04507): a window of whole tiles in time, height and width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightforcing_ref.errors import ConfigError

from .view import View

__all__ = ["SlidingTile"]


@dataclass(frozen=True)
class SlidingTile:
    """A query tile sees the key tiles within a window around it; at a border the window moves inwards.

    Args:
        windows: tiles seen on each axis (time, height, width), odd; one window for all heads, or one for each.
        tile: rows and columns of a tile, which is one frame deep. Tiles at the lower and right border are smaller
            where the grid is no multiple, e.g. 30x52.
        sink_frames: oldest resident frames that everybody sees. Ours; the method has none.
    """

    windows: tuple[tuple[int, int, int], ...] = ((5, 3, 3),)
    tile: tuple[int, int] = (8, 8)
    sink_frames: int = 0

    def __post_init__(self) -> None:
        if not self.windows or any(
            len(window) != 3 or min(window) < 1 or not all(n % 2 for n in window) for window in self.windows
        ):
            raise ConfigError(
                f"the windows are {self.windows}; expected odd, positive numbers of tiles in (time, height, width)"
            )
        if len(self.tile) != 2 or min(self.tile) < 1 or self.sink_frames < 0:
            raise ConfigError(
                f"tile and sink frames are {self.tile} and {self.sink_frames}; expected positive (rows, columns) "
                "and at least 0"
            )

    def visible(self, view: View) -> Tensor:
        """Bool `[1 or H, T, K]`.

        Raises:
            ConfigError: the number of windows is neither one nor that of the heads.
        """
        heads = view.q.shape[1]
        if len(self.windows) not in (1, heads):
            raise ConfigError(
                f"there are {len(self.windows)} windows; expected one, or one for each of {heads} heads"
            )
        rows, columns = view.grid
        place = torch.arange(rows * columns, device=view.q.device)
        tiles = (place // columns // self.tile[0], place % columns // self.tile[1])
        counts = (view.frames, -(-rows // self.tile[0]), -(-columns // self.tile[1]))
        current = view.frames - view.past_frames
        queries = (view.query_frames(), *(axis.repeat(current) for axis in tiles))
        keys = (view.key_frames(), *(axis.repeat(view.frames) for axis in tiles))
        sink = (keys[0] < self.sink_frames)[None]
        return torch.stack([self._window(window, queries, keys, counts) | sink for window in self.windows])

    @staticmethod
    def _window(
        window: tuple[int, int, int],
        queries: tuple[Tensor, ...],
        keys: tuple[Tensor, ...],
        counts: tuple[int, int, int],
    ) -> Tensor:
        seen = torch.ones(len(queries[0]), len(keys[0]), dtype=torch.bool, device=keys[0].device)
        for size, query, key, count in zip(window, queries, keys, counts, strict=True):
            if size < count:
                reach = size // 2
                centre = query.clamp(reach, count - 1 - reach)
                seen &= (centre[:, None] - key[None]).abs() <= reach
        return seen
