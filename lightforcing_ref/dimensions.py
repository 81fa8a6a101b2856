"""Dimensions of the text encoder and of the video decoders, apart from the models so that planning needs no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = [
    "DECODERS",
    "LIGHT_TAE",
    "LIGHT_VAE",
    "TAE",
    "TINY_TAE",
    "TINY_VAE",
    "UMT5_TINY",
    "UMT5_XXL",
    "WAN_VAE",
    "DecoderConfig",
    "TAEConfig",
    "UMT5Config",
    "VAEConfig",
]


@dataclass(frozen=True)
class VAEConfig:
    """Widths of a decoder: `dim` at full resolution, times `dim_mult[-1]` at the latent's."""

    dim: int
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_dim: int = 16
    temporal_upsample: tuple[bool, ...] = (True, True, False)
    """Whether each upsampling also doubles the frame rate, from the latent's resolution upwards."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the middle, then of each stage's output, from the latent's resolution upwards."""
        return tuple(self.dim * mult for mult in (self.dim_mult[-1], *reversed(self.dim_mult)))

    @property
    def temporal_factor(self) -> int:
        """Pixel frames per latent frame after the first."""
        return 1 << sum(self.temporal_upsample)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent pixel, in height and in width."""
        return 1 << len(self.temporal_upsample)


WAN_VAE = VAEConfig(dim=96)
LIGHT_VAE = VAEConfig(dim=24)
"""Every width of `WAN_VAE` cut to int(d * (1 - 0.75))."""
TINY_VAE = VAEConfig(dim=8)


@dataclass(frozen=True)
class TAEConfig:
    """A tiny decoder: convolutions over single frames, whose only past are blocks that also see the frame before."""

    widths: tuple[int, ...] = (256, 128, 64, 64)
    """Channels of each stage at its own resolution, from the latent's upwards, and then at the video's."""
    z_dim: int = 16
    temporal_upsample: tuple[bool, ...] = (False, True, True)
    """Whether each upsampling also doubles the frame rate, from the latent's resolution upwards."""
    denormalise: bool = False
    """Whether it takes `z * std + mean`, as LightTAE does; TAEHV takes latents as the transformer leaves them."""

    @property
    def dim(self) -> int:
        """Channels at full resolution."""
        return self.widths[-1]

    @property
    def temporal_factor(self) -> int:
        """Pixel frames per latent frame after the first."""
        return 1 << sum(self.temporal_upsample)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent pixel, in height and in width."""
        return 1 << len(self.temporal_upsample)


TAE = TAEConfig()
"""TAEHV's `taew2_1`."""
LIGHT_TAE = TAEConfig(denormalise=True)
TINY_TAE = TAEConfig(widths=(16, 8, 8, 8))

DecoderConfig = VAEConfig | TAEConfig

DECODERS: Mapping[str, DecoderConfig] = MappingProxyType(
    {
        "wan": WAN_VAE,
        "light": LIGHT_VAE,
        "tiny": TINY_VAE,
        "tae": TAE,
        "light-tae": LIGHT_TAE,
        "tiny-tae": TINY_TAE,
    }
)
"""The decoders that have a name."""


@dataclass(frozen=True)
class UMT5Config:
    """Dimensions of a UMT5 encoder."""

    vocab: int
    d_model: int
    d_ff: int
    heads: int
    d_kv: int
    layers: int
    eps: float = 1e-6
    buckets: int = 32
    """Relative-position buckets, both directions together."""
    max_distance: int = 128
    """Distance in tokens from which on all positions share a bucket."""
    pad_id: int = 0
    eos_id: int = 1


UMT5_XXL = UMT5Config(vocab=256384, d_model=4096, d_ff=10240, heads=64, d_kv=64, layers=24)
UMT5_TINY = UMT5Config(vocab=259, d_model=64, d_ff=128, heads=4, d_kv=16, layers=2)
"""Reads bytes: ids 0 pad, 1 end, 2 unknown, then byte b at 3 + b."""
