"""Layers of the Wan autoencoder, whole-clip and streaming: what its decoder and its encoder are made of.

Streaming, a layer with a past takes it from a `Tape` and leaves the new one there. Source: Wan2.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "HISTORY",
    "LATENT_MEAN",
    "LATENT_STD",
    "CacheSpec",
    "CausalConv3d",
    "ChannelNorm",
    "FrameAttention",
    "ResidualBlock",
    "Tape",
    "stream_through",
]

LATENT_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENT_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
"""Per-channel statistics of the latents; the transformer works on `(z - mean) / std`."""

HISTORY = 2
"""Past frames seen by a causal convolution, whose kernel spans three."""


@runtime_checkable
class Streaming(Protocol):
    """A layer with a past. Every other layer treats each frame on its own."""

    def stream(self, x: Tensor, tape: Tape) -> Tensor:
        """The next frames, with what the tape holds before them."""


@dataclass(frozen=True)
class CacheSpec:
    """One streaming cache: the past of one layer, such as the last two input frames of a causal convolution."""

    name: str
    shape: tuple[int, ...]
    """`[1, channels, frames, height, width]`; of a tiny decoder `[1, channels, height, width]`."""
    written_by_first: bool
    """False for the temporal upsamplings, which the first frame bypasses: their caches stay zero."""


class Tape:
    """The caches of one streaming call, read and written in the order in which the convolutions run."""

    def __init__(self, caches: Sequence[Tensor] | None) -> None:
        self.is_first = caches is None
        self._old: Iterator[Tensor] = iter(caches or ())
        self.new: list[Tensor] = []

    def prepend_history(self, x: Tensor) -> Tensor:
        """`x` `[1, C, t, h, w]` behind the two frames that came before it; remembers the last two of the result."""
        x = torch.cat([self._zeros(x) if self.is_first else next(self._old), x], dim=2)
        self.new.append(x[:, :, -HISTORY:].clone())  # a view would keep all of `x` in memory
        return x

    def bypass(self, x: Tensor) -> None:
        """Leave the cache of a convolution that does not run on the first frame empty."""
        self.new.append(self._zeros(x))

    def last_frame(self, x: Tensor) -> Tensor | None:
        """The frame that came before `x`, `None` before the first one; remembers the last frame of `x`."""
        before = None if self.is_first else next(self._old)
        self.new.append(x[:, :, -1:].clone())
        return before

    @staticmethod
    def _zeros(x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], x.shape[1], HISTORY, x.shape[3], x.shape[4])


class CausalConv3d(nn.Conv3d):
    """Convolution over `[1, C, t, h, w]` that keeps the extent and sees, in time, the current and past frames only."""

    def __init__(self, in_dim: int, out_dim: int, kernel: tuple[int, int, int]) -> None:
        super().__init__(in_dim, out_dim, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor) -> Tensor:
        """The whole clip, with zeros before its start."""
        return super().forward(F.pad(x, (0, 0, 0, 0, self.kernel_size[0] - 1, 0)))

    def stream(self, x: Tensor, tape: Tape) -> Tensor:
        """The next frames, with the tape's frames before them."""
        return super().forward(tape.prepend_history(x))


class ChannelNorm(nn.Module):
    """L2-normalise over the channels, times sqrt(C) and `gamma`; in float32 at least, whatever the input's type."""

    def __init__(self, dim: int, trailing: int = 3) -> None:
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * trailing))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        length = torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min(1e-12)
        return (wide / length).to(x.dtype) * (self.gamma * self.scale)


class ResidualBlock(nn.Module):
    """Two norm-SiLU-convolution steps around a shortcut."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            ChannelNorm(in_dim),
            nn.SiLU(),
            CausalConv3d(in_dim, out_dim, (3, 3, 3)),
            ChannelNorm(out_dim),
            nn.SiLU(),
            nn.Dropout(0.0),  # holds the place that gives the second convolution its public index
            CausalConv3d(out_dim, out_dim, (3, 3, 3)),
        )
        self.shortcut = nn.Identity() if in_dim == out_dim else CausalConv3d(in_dim, out_dim, (1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x) + self.shortcut(x)

    def stream(self, x: Tensor, tape: Tape) -> Tensor:
        return stream_through(self.residual, x, tape) + self.shortcut(x)


class FrameAttention(nn.Module):
    """Single-head self-attention among the pixels of each frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim, trailing=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        channels, frames, height, width = x.shape[1:]
        images = x[0].transpose(0, 1)
        q, k, v = self.to_qkv(self.norm(images)).flatten(2).chunk(3, dim=1)  # each [frames, C, pixels]
        weights = torch.softmax((q * channels**-0.5).transpose(1, 2) @ k, dim=-1)
        mixed = v @ weights.transpose(1, 2)
        images = images + self.proj(mixed.reshape(frames, channels, height, width))
        return images.transpose(0, 1)[None]


def stream_through(layers: Iterable[nn.Module], x: Tensor, tape: Tape) -> Tensor:
    """Pass the next frames through layers one after another."""
    for layer in layers:
        x = layer.stream(x, tape) if isinstance(layer, Streaming) else layer(x)
    return x
