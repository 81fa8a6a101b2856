"""The tiny video decoders: TAEHV (`taew2_1`) and LightTAE, whole-clip and streaming.

Frames pass through two-dimensional convolutions. Only the memory blocks see a past: each reads its own input of the
frame before, zeros before the first. `TAEDecoder.decode_first` and `decode_next` carry these inputs as plain tensors,
so streaming gives what `TAEDecoder.decode` gives for the whole clip.

Source: TAEHV by Ollin Boer Bohan (the network and its files), LightX2V (LightTAE, which takes denormalised latents).
The state-dict keys are those of `taew2_1.pth` and `lighttaew2_1.pth` without the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightforcing_ref.dimensions import LIGHT_TAE, TAE, TINY_TAE, DecoderConfig, TAEConfig

from .layers import CacheSpec
from .vae import LatentScale, VAEDecoder

__all__ = ["LIGHT_TAE", "TAE", "TINY_TAE", "TAEConfig", "TAEDecoder", "VideoDecoder", "video_decoder"]

LATENT_BOUND = 3.0
"""Latents are squeezed smoothly into this range, either way."""

BLOCKS = 3
"""Memory blocks in a stage."""


class SoftClamp(nn.Module):
    """Squeeze values into -3..3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / LATENT_BOUND) * LATENT_BOUND


class MemoryBlock(nn.Module):
    """Three convolutions over a frame and the one before, around a shortcut."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(2 * dim, dim), nn.ReLU(), _conv(dim, dim), nn.ReLU(), _conv(dim, dim))

    def forward(self, x: Tensor, before: Tensor | None) -> Tensor:
        """`x` `[t, C, h, w]`; `before` `[1, C, h, w]` is this block's input of the frame before `x[0]`, None at the
        start of a clip.
        """
        if before is None:
            past = F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:-1]  # a tensor of zeros would be stored in the graph
        else:
            past = before if len(x) == 1 else torch.cat([before, x[:-1]])
        return F.relu(self.conv(torch.cat([x, past], dim=1)) + x)


class Grow(nn.Module):
    """Turn each frame into `count` successive ones."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, count * dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape[1:]
        return self.conv(x).reshape(-1, channels, height, width)


def _conv(in_dim: int, out_dim: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_dim, out_dim, 3, padding=1, bias=bias)


class TAEDecoder(nn.Module):
    """Latents to video, with the interface of `vae.VAEDecoder`.

    Latents are `[16, frames, h, w]` or, for a whole clip, `[frames, 16, h, w]`, normalised as the transformer leaves
    them. Videos are `[N, 3, 8h, 8w]`, nominally in -1..1 and not clamped: the network itself works in 0..1.
    """

    def __init__(self, config: TAEConfig) -> None:
        super().__init__()
        self.config = config
        self.scale: nn.Module = LatentScale() if config.denormalise else nn.Identity()
        layers: list[nn.Module] = [SoftClamp(), _conv(config.z_dim, config.widths[0]), nn.ReLU()]
        for width, out_dim, doubled in zip(
            config.widths, config.widths[1:], config.temporal_upsample, strict=False
        ):
            layers += [MemoryBlock(width) for _ in range(BLOCKS)]
            layers += [nn.Upsample(scale_factor=2.0, mode="nearest"), Grow(width, 2 if doubled else 1)]
            layers.append(_conv(width, out_dim, bias=False))
        layers += [nn.ReLU(), _conv(config.widths[-1], 3)]
        self.decoder = nn.Sequential(*layers)

    @property
    def entry(self) -> nn.Module:
        """The first layer with weights: what comes before it is computed in the latents' type."""
        return self.decoder[1]

    def decode(self, latents: Tensor) -> Tensor:
        """Decode a whole clip `[F, 16, h, w]` at once to `[1 + 4 (F - 1), 3, 8h, 8w]`."""
        video, _ = self._run(latents.transpose(0, 1), None)
        return video[self.config.temporal_factor - 1 :]

    def decode_first(self, latent: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Decode the first latent frame `[16, 1, h, w]` of a clip.

        Returns:
            The single pixel frame `[1, 3, 8h, 8w]`, and every cache of `cache_specs` in order.
        """
        return self._run(latent, None, last_only=True)

    def decode_next(self, latent: Tensor, caches: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Decode one or more later latent frames `[16, n, h, w]`.

        Returns:
            The pixel frames `[4n, 3, 8h, 8w]`, and the new caches, shaped like `caches`, which stay as they were.
        """
        return self._run(latent, caches)

    def cache_specs(self, height: int, width: int) -> list[CacheSpec]:
        """The caches `cache.0`, `cache.1`, ... for latents of `height` x `width`, in the order of the calls above."""
        specs: list[CacheSpec] = []
        for stage, dim in enumerate(self.config.widths[:-1]):
            shape = (1, dim, height << stage, width << stage)
            for _ in range(BLOCKS):
                specs.append(CacheSpec(f"cache.{len(specs)}", shape, written_by_first=True))
        return specs

    def _run(
        self, latents: Tensor, caches: Sequence[Tensor] | None, *, last_only: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Decode `[16, t, h, w]`; with `last_only` the last pixel frame alone, as far as no memory needs the others."""
        x = self.scale(latents).transpose(0, 1)
        new: list[Tensor] = []
        memories = BLOCKS * (len(self.config.widths) - 1)
        for layer in self.decoder:
            if isinstance(layer, MemoryBlock):
                before = None if caches is None else caches[len(new)]
                new.append(x[-1:].clone())  # a view would keep all of `x` in memory
                x = layer(x, before)
            else:
                x = layer(x)
            if last_only and len(new) == memories:
                x = x[-1:]
        return x * 2 - 1, new


VideoDecoder = VAEDecoder | TAEDecoder


def video_decoder(config: DecoderConfig) -> VideoDecoder:
    """The decoder of a configuration, with random weights."""
    return TAEDecoder(config) if isinstance(config, TAEConfig) else VAEDecoder(config)
