"""Three-axis rotary position embedding of Wan: interleaved pairs, each axis with its own exponents."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["apply_rope", "rope_angles", "rope_axes", "rope_tables"]


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that rotate with (time, height, width); 128 -> (44, 42, 42)."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def rope_angles(positions: Tensor, grid: tuple[int, int], head_dim: int, *, theta: float = 10000.0) -> Tensor:
    """Rotation angles of whole frames.

    Args:
        positions: temporal position of each frame, `[frames]`; any real number, there is no upper limit.
        grid: tokens per frame as (height, width).

    Returns:
        float64 `[frames * height * width, head_dim / 2]`, tokens in raster order.
    """
    height, width = grid
    frames = positions.numel()
    axes = (
        positions.double()[:, None, None].expand(frames, height, width),
        torch.arange(height, dtype=torch.float64)[None, :, None].expand(frames, height, width),
        torch.arange(width, dtype=torch.float64)[None, None, :].expand(frames, height, width),
    )
    angles = []
    for position, dim in zip(axes, rope_axes(head_dim), strict=True):
        frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(position.reshape(-1, 1) * frequency)
    return torch.cat(angles, dim=-1)


def rope_tables(
    positions: Tensor, grid: tuple[int, int], head_dim: int, *, theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """(cos, sin) of `rope_angles`, computed in float64 and rounded once to float32."""
    angles = rope_angles(positions, grid, head_dim, theta=theta)
    return angles.cos().float(), angles.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved (even, odd) channel pairs of `x` `[..., T, H, D]` by cos/sin `[T, D/2]`."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
