"""Radial attention (arXiv 2506.19852): the farther apart two frames, the narrower the band they see of each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightforcing_ref.errors import ConfigError

from .view import View

__all__ = ["Radial"]

_DENSE_COLUMN, _DENSE_COLUMNS = 1 / 3, 0.6
"""A block stays if more than 60 % of the columns with anything in them are filled to more than a third."""


@dataclass(frozen=True)
class Radial:
    """A static map from the distance of frames alone, the same for every head.

    Frames at distance 0 and 1 see each other whole. At distance d, tokens a and b do where |a - b| is at most
    decay * 2^bits(n) / 2^bits(d), n tokens a frame, but at least a key block; where the span before decay is
    below a key block, only every (block / span)-th distance has a band at all. Blocks are kept or dropped whole.

    Args:
        decay: factor on the width of the bands.
        sink_frames: oldest resident frames that everybody sees whole.
    """

    decay: float = 0.2
    sink_frames: int = 1

    def __post_init__(self) -> None:
        if not self.decay > 0 or self.sink_frames < 0:
            raise ConfigError(
                f"decay and sink frames are {self.decay} and {self.sink_frames}; expected decay > 0, sink >= 0"
            )

    def width(self, distance: int, frame_tokens: int, block: int) -> float:
        """Half the width of the band between frames `distance` >= 2 apart, in tokens; below 0: no band."""
        span = 2.0 ** (frame_tokens.bit_length() - distance.bit_length())
        if span < block and distance % max(1, int(block / span)):
            return -1.0
        return max(span * self.decay, float(block))

    def visible(self, view: View) -> Tensor:
        """Bool `[1, T, K]`."""
        geometry = view.geometry
        blocks = torch.ones(
            view.frames - view.past_frames,
            geometry.q_blocks,
            view.frames,
            geometry.k_blocks,
            dtype=torch.bool,
            device=view.q.device,
        )
        maps: dict[int, Tensor] = {}
        for frame in range(view.past_frames, view.frames):
            for other in range(self.sink_frames, view.frames):
                distance = abs(frame - other)
                if distance > 1:
                    if distance not in maps:
                        maps[distance] = self._blocks(view, distance)
                    blocks[frame - view.past_frames, :, other] = maps[distance]
        return view.spread(blocks.flatten(2).flatten(0, 1)[None])

    def _blocks(self, view: View, distance: int) -> Tensor:
        """Blocks that two frames see of each other, bool `[q_blocks, k_blocks]`."""
        geometry = view.geometry
        tokens, block_q, block_k = geometry.frame_tokens, geometry.block_q, geometry.block_k
        place = torch.arange(tokens, device=view.q.device)
        width = self.width(distance, tokens, block_k)
        band = (place[:, None] - place[None]).abs() <= width
        padding = (0, geometry.k_blocks * block_k - tokens, 0, geometry.q_blocks * block_q - tokens)
        tiles = F.pad(band, padding).unflatten(1, (-1, block_k)).unflatten(0, (-1, block_q))
        rows = (tokens - torch.arange(geometry.q_blocks, device=place.device) * block_q).clamp(max=block_q)
        filled = tiles.sum(1)  # [q_blocks, k_blocks, block_k]
        dense = (filled > _DENSE_COLUMN * rows[:, None, None]).sum(2)
        return dense > _DENSE_COLUMNS * (filled > 0).sum(2)
