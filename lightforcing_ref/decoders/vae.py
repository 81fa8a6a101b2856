"""The Wan video decoder and its light variants: one network, three widths, whole-clip and streaming.

`VAEDecoder.decode` runs a whole clip with causal padding. `VAEDecoder.decode_first` and `decode_next` decode latent
frame by latent frame: every causal convolution keeps the last two frames of its own input, passed in and out as plain
tensors. The two give the same video.

Source: Wan2.1 (decoder), LightX2V (the narrow one); the state-dict keys are those of `Wan2.1_VAE.pth` and
`lightvaew2_1.pth` without the encoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightforcing_ref.dimensions import LIGHT_VAE, TINY_VAE, WAN_VAE, VAEConfig

__all__ = [
    "LATENT_MEAN",
    "LATENT_STD",
    "LIGHT_VAE",
    "TINY_VAE",
    "WAN_VAE",
    "CacheSpec",
    "LatentScale",
    "VAEConfig",
    "VAEDecoder",
    "to_uint8",
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


@dataclass(frozen=True)
class CacheSpec:
    """One streaming cache: the past of one layer, such as the last two input frames of a causal convolution."""

    name: str
    shape: tuple[int, ...]
    """`[1, channels, 2, height, width]`; of a tiny decoder `[1, channels, height, width]`."""
    written_by_first: bool
    """False for the temporal upsamplings, which the first frame bypasses: their caches stay zero."""


class LatentScale(nn.Module):
    """From normalised latents `[16, t, h, w]`, as the transformer leaves them, to `z * std + mean`."""

    def forward(self, latents: Tensor) -> Tensor:
        # Constants and not buffers, so that a decoder built on the meta device needs its checkpoint and nothing else.
        mean, std = (latents.new_tensor(values)[:, None, None, None] for values in (LATENT_MEAN, LATENT_STD))
        return latents * std + mean


class _Tape:
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

    def stream(self, x: Tensor, tape: _Tape) -> Tensor:
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

    def stream(self, x: Tensor, tape: _Tape) -> Tensor:
        return _stream_through(self.residual, x, tape) + self.shortcut(x)


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


class Upsample(nn.Module):
    """Double height and width and halve the channels; with `temporal`, double the frames first."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest"), nn.Conv2d(dim, dim // 2, 3, padding=1)
        )
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor) -> Tensor:
        """The clip's first frame stays single, and the temporal convolution's past begins after it."""
        if self.time_conv is not None and x.shape[2] > 1:
            x = torch.cat([x[:, :, :1], self._interleave(self.time_conv(x[:, :, 1:]))], dim=2)
        return self._enlarge(x)

    def stream(self, x: Tensor, tape: _Tape) -> Tensor:
        if self.time_conv is not None:
            if tape.is_first:
                tape.bypass(x)
            else:
                x = self._interleave(self.time_conv.stream(x, tape))
        return self._enlarge(x)

    @staticmethod
    def _interleave(x: Tensor) -> Tensor:
        """`[1, 2C, t, h, w]`, whose two channel halves are successive frames, to `[1, C, 2t, h, w]`."""
        batch, channels, frames, height, width = x.shape
        pairs = x.reshape(batch, 2, channels // 2, frames, height, width)
        return pairs.permute(0, 2, 3, 1, 4, 5).reshape(batch, channels // 2, 2 * frames, height, width)

    def _enlarge(self, x: Tensor) -> Tensor:
        return self.resample(x[0].transpose(0, 1)).transpose(0, 1)[None]


class Decoder(nn.Module):
    """From `[1, z_dim, t, h, w]` to `[1, 3, T, 8h, 8w]`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        middle, *stages = config.widths
        self.conv1 = CausalConv3d(config.z_dim, middle, (3, 3, 3))
        self.middle = nn.Sequential(
            ResidualBlock(middle, middle), FrameAttention(middle), ResidualBlock(middle, middle)
        )
        layers: list[nn.Module] = []
        width = middle
        for stage, out_dim in enumerate(stages):
            for _ in range(config.num_res_blocks + 1):
                layers.append(ResidualBlock(width, out_dim))
                width = out_dim
            if stage < len(config.temporal_upsample):
                layers.append(Upsample(width, config.temporal_upsample[stage]))
                width //= 2
        self.upsamples = nn.Sequential(*layers)
        self.head = nn.Sequential(ChannelNorm(width), nn.SiLU(), CausalConv3d(width, 3, (3, 3, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.upsamples(self.middle(self.conv1(x))))

    def stream(self, x: Tensor, tape: _Tape) -> Tensor:
        return _stream_through((self.conv1, *self.middle, *self.upsamples, *self.head), x, tape)


_STREAMING = (CausalConv3d, ResidualBlock, Upsample)
"""Layers with a past. Every other layer treats each frame on its own."""


def _stream_through(layers: Iterable[nn.Module], x: Tensor, tape: _Tape) -> Tensor:
    for layer in layers:
        x = layer.stream(x, tape) if isinstance(layer, _STREAMING) else layer(x)
    return x


class VAEDecoder(nn.Module):
    """Latents to video.

    Latents are `[16, frames, h, w]` or, for a whole clip, `[frames, 16, h, w]`, normalised as the transformer leaves
    them; `z * std + mean` happens here. Videos are `[N, 3, 8h, 8w]`, nominally in -1..1 and not clamped.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.scale: nn.Module = LatentScale()
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = Decoder(config)

    @property
    def entry(self) -> nn.Module:
        """The first layer with weights: what comes before it is computed in the latents' type."""
        return self.conv2

    def decode(self, latents: Tensor) -> Tensor:
        """Decode a whole clip `[F, 16, h, w]` at once to `[1 + 4 (F - 1), 3, 8h, 8w]`."""
        return self.decoder(self._denormalise(latents.transpose(0, 1)))[0].transpose(0, 1)

    def decode_first(self, latent: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Decode the first latent frame `[16, 1, h, w]` of a clip.

        Returns:
            The single pixel frame `[1, 3, 8h, 8w]`, and every cache of `cache_specs` in order; those that the first
            frame does not write are zeros.
        """
        return self._stream(latent, None)

    def decode_next(self, latent: Tensor, caches: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Decode one or more later latent frames `[16, n, h, w]`.

        Returns:
            The pixel frames `[4n, 3, 8h, 8w]`, and the new caches, shaped like `caches`, which stay as they were.
        """
        return self._stream(latent, caches)

    def cache_specs(self, height: int, width: int) -> list[CacheSpec]:
        """The caches `cache.0`, `cache.1`, ... for latents of `height` x `width`, in the order of the calls above."""
        specs: list[CacheSpec] = []

        def add(conv: CausalConv3d, scale: int, written_by_first: bool = True) -> None:
            shape = (1, conv.in_channels, HISTORY, scale * height, scale * width)
            specs.append(CacheSpec(f"cache.{len(specs)}", shape, written_by_first))

        scale = 1
        add(self.decoder.conv1, scale)
        for layer in (*self.decoder.middle, *self.decoder.upsamples):
            if isinstance(layer, ResidualBlock):
                for conv in layer.residual:
                    if isinstance(conv, CausalConv3d):
                        add(conv, scale)
            elif isinstance(layer, Upsample):
                if layer.time_conv is not None:
                    add(layer.time_conv, scale, written_by_first=False)
                scale *= 2
        for layer in self.decoder.head:
            if isinstance(layer, CausalConv3d):
                add(layer, scale)
        return specs

    def _stream(self, latent: Tensor, caches: Sequence[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        tape = _Tape(caches)
        video = self.decoder.stream(self._denormalise(latent), tape)
        return video[0].transpose(0, 1), tape.new

    def _denormalise(self, latents: Tensor) -> Tensor:
        """Normalised latents `[16, t, h, w]` to the decoder's input `[1, 16, t, h, w]`."""
        denormalised: Tensor = self.conv2(self.scale(latents)[None])
        return denormalised


def to_uint8(video: Tensor) -> Tensor:
    """Video `[N, 3, H, W]` in -1..1 to pixels `[N, H, W, 3]` in 0..255, clamped and rounded half to even."""
    return ((video + 1) * 127.5).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)
