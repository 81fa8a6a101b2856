"""The Wan video decoder and its light variants: one network, three widths, whole-clip and streaming.

`VAEDecoder.decode` runs a whole clip with causal padding. `VAEDecoder.decode_first` and `decode_next` decode latent
frame by latent frame: every causal convolution keeps the last two frames of its own input, passed in and out as plain
tensors. The two give the same video.

Source: Wan2.1 (decoder), LightX2V (the narrow one); the state-dict keys are those of `Wan2.1_VAE.pth` and
`lightvaew2_1.pth` without the encoder.
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

__all__ = ["LatentScale", "VAEDecoder", "to_uint8"]


class LatentScale(nn.Module):
    """From normalised latents `[16, t, h, w]`, as the transformer leaves them, to `z * std + mean`."""

    def forward(self, latents: Tensor) -> Tensor:
        # Constants and not buffers, so that a decoder built on the meta device needs its checkpoint and nothing else.
        mean, std = (latents.new_tensor(values)[:, None, None, None] for values in (LATENT_MEAN, LATENT_STD))
        return latents * std + mean


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

    def stream(self, x: Tensor, tape: Tape) -> Tensor:
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

    def stream(self, x: Tensor, tape: Tape) -> Tensor:
        return stream_through((self.conv1, *self.middle, *self.upsamples, *self.head), x, tape)


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
        tape = Tape(caches)
        video = self.decoder.stream(self._denormalise(latent), tape)
        return video[0].transpose(0, 1), tape.new

    def _denormalise(self, latents: Tensor) -> Tensor:
        """Normalised latents `[16, t, h, w]` to the decoder's input `[1, 16, t, h, w]`."""
        denormalised: Tensor = self.conv2(self.scale(latents)[None])
        return denormalised


def to_uint8(video: Tensor) -> Tensor:
    """Video `[N, 3, H, W]` in -1..1 to pixels `[N, H, W, 3]` in 0..255, clamped and rounded half to even."""
    return ((video + 1) * 127.5).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)
