"""The Wan video encoder and its light variants: from frames to the latents that the transformer works on.

`VAEEncoder.encode` runs a whole clip with causal padding; `encode_first` and `encode_next` encode it as it comes, one
pixel frame for the first latent frame and four for every later one. The two give the same latents.

Source: Wan2.1 (encoder); the state-dict keys are those of `Wan2.1_VAE.pth` and `lightvaew2_1.pth` without the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightforcing_ref.dimensions import VAEConfig

from .layers import (
    HISTORY,
    LATENT_MEAN,
    LATENT_STD,
    CacheSpec,
    CausalConv3d,
    ChannelNorm,
    FrameAttention,
    ResidualBlock,
    Tape,
    stream_through,
)

__all__ = ["LatentNorm", "VAEEncoder", "from_uint8"]


class LatentNorm(nn.Module):
    """From latents `[16, t, h, w]` as the network leaves them to `(z - mean) / std`."""

    def forward(self, latents: Tensor) -> Tensor:
        # Constants and not buffers, as in `LatentScale`.
        mean, std = (latents.new_tensor(values)[:, None, None, None] for values in (LATENT_MEAN, LATENT_STD))
        return (latents - mean) / std


class Downsample(nn.Module):
    """Halve height and width; with `temporal`, then halve the frames, of which the clip's first stays single."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        # One column and one row of zeros behind the last ones, none before the first.
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor) -> Tensor:
        """`[1, C, 1 + 2n, h, w]` to `[1, C, 1 + n, h / 2, w / 2]`; without `temporal` any number of frames."""
        x = self._shrink(x)
        if self.time_conv is not None and x.shape[2] > 1:
            x = torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)
        return x

    def stream(self, x: Tensor, tape: Tape) -> Tensor:
        """The next frames, an even number of them after the first one."""
        x = self._shrink(x)
        if self.time_conv is not None:
            before = tape.last_frame(x)
            if before is not None:
                x = self.time_conv(torch.cat([before, x], dim=2))
        return x

    def _shrink(self, x: Tensor) -> Tensor:
        return self.resample(x[0].transpose(0, 1)).transpose(0, 1)[None]


class Encoder(nn.Module):
    """From `[1, 3, T, 8h, 8w]` to the moments `[1, 2 z_dim, t, h, w]`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        stages = config.widths[:0:-1]
        middle = stages[-1]
        self.conv1 = CausalConv3d(3, config.dim, (3, 3, 3))
        layers: list[nn.Module] = []
        width = config.dim
        for stage, out_dim in enumerate(stages):
            for _ in range(config.num_res_blocks):
                layers.append(ResidualBlock(width, out_dim))
                width = out_dim
            if stage < len(config.temporal_upsample):
                layers.append(Downsample(width, config.temporal_upsample[-1 - stage]))
        self.downsamples = nn.Sequential(*layers)
        self.middle = nn.Sequential(
            ResidualBlock(middle, middle), FrameAttention(middle), ResidualBlock(middle, middle)
        )
        self.head = nn.Sequential(
            ChannelNorm(middle), nn.SiLU(), CausalConv3d(middle, 2 * config.z_dim, (3, 3, 3))
        )

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """In the order in which they run."""
        return self.conv1, *self.downsamples, *self.middle, *self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.downsamples(self.conv1(x))))

    def stream(self, x: Tensor, tape: Tape) -> Tensor:
        return stream_through(self.layers, x, tape)


class VAEEncoder(nn.Module):
    """Video to latents: the mean of the posterior, normalised as the transformer takes it.

    Videos are `[N, 3, 8h, 8w]` in -1..1. Latents are `[16, frames, h, w]` or, for a whole clip, `[frames, 16, h, w]`;
    `(z - mean) / std` happens here.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1))
        self.scale: nn.Module = LatentNorm()

    @property
    def dtype(self) -> torch.dtype:
        """The type that it computes in, up to the normalisation."""
        return self.encoder.conv1.weight.dtype

    def encode(self, video: Tensor) -> Tensor:
        """Encode a whole clip `[1 + 4 (F - 1), 3, 8h, 8w]` at once to `[F, 16, h, w]`."""
        return self._normalise(self.encoder(video.transpose(0, 1)[None])).transpose(0, 1)

    def encode_first(self, frame: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Encode the first frame `[1, 3, 8h, 8w]` of a clip.

        Returns:
            The latent `[16, 1, h, w]`, and every cache of `cache_specs` in order.
        """
        return self._stream(frame, None)

    def encode_next(self, frames: Tensor, caches: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Encode later frames `[4n, 3, 8h, 8w]`.

        Returns:
            The latents `[16, n, h, w]`, and the new caches, shaped like `caches`, which stay as they were.
        """
        return self._stream(frames, caches)

    def cache_specs(self, height: int, width: int) -> list[CacheSpec]:
        """The caches `cache.0`, `cache.1`, ... for latents of `height` x `width`, in the order of the calls above."""
        specs: list[CacheSpec] = []
        scale = self.config.spatial_factor

        def add(channels: int, frames: int) -> None:
            shape = (1, channels, frames, scale * height, scale * width)
            specs.append(CacheSpec(f"cache.{len(specs)}", shape, written_by_first=True))

        for layer in self.encoder.layers:
            if isinstance(layer, CausalConv3d):
                add(layer.in_channels, HISTORY)
            elif isinstance(layer, ResidualBlock):
                for conv in layer.residual:
                    if isinstance(conv, CausalConv3d):
                        add(conv.in_channels, HISTORY)
            elif isinstance(layer, Downsample):
                scale //= 2
                if layer.time_conv is not None:
                    add(layer.time_conv.in_channels, 1)
        return specs

    def _stream(self, frames: Tensor, caches: Sequence[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        tape = Tape(caches)
        moments = self.encoder.stream(frames.transpose(0, 1)[None], tape)
        return self._normalise(moments), tape.new

    def _normalise(self, moments: Tensor) -> Tensor:
        """Moments `[1, 32, t, h, w]` to latents `[16, t, h, w]`, in float32 at least."""
        means = self.conv1(moments)[0, : self.config.z_dim]
        latents: Tensor = self.scale(means.to(torch.promote_types(means.dtype, torch.float32)))
        return latents


def from_uint8(pixels: Tensor) -> Tensor:
    """Pixels `[N, H, W, 3]` in 0..255 to video `[N, 3, H, W]` in -1..1, float32."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
