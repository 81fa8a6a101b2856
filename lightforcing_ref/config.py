"""Model sizes and presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .dimensions import LIGHT_VAE, TINY_VAE, UMT5_TINY, UMT5_XXL, DecoderConfig, UMT5Config
from .errors import ConfigError
from .sparsity import BlockGeometry

__all__ = ["CHUNK_FRAMES", "PRESETS", "DiTConfig", "Preset", "preset", "video_frames"]

CHUNK_FRAMES = 3
"""Latent frames per chunk."""

VAE_STRIDE = 8
"""Pixels per latent pixel, in height and in width."""


@dataclass(frozen=True)
class DiTConfig:
    """Dimensions of the causal Wan diffusion transformer."""

    dim: int
    ffn_dim: int
    heads: int
    layers: int
    text_dim: int
    text_len: int
    freq_dim: int = 256
    channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    rope_theta: float = 10000.0
    linear_branch: bool = False
    """Whether self-attention has the projection of SLA's linear branch."""

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


@dataclass(frozen=True)
class Preset:
    """A complete model: transformer, decoder, text encoder, and the video format it is made for."""

    name: str
    dit: DiTConfig
    vae: DecoderConfig
    text: UMT5Config
    height: int
    width: int
    block: int
    """Attention block that suits the preset's frames where the target states none, in tokens."""
    fps: int = 16

    def latent_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Latent (height, width) of a video of `height` x `width` pixels, by default the preset's own.

        Raises:
            ConfigError: the size is no multiple of 16 pixels (8 per latent pixel, 2 latent pixels per token).
        """
        height, width = height or self.height, width or self.width
        for name, value, patch in (
            ("height", height, self.dit.patch[1]),
            ("width", width, self.dit.patch[2]),
        ):
            step = VAE_STRIDE * patch
            if value < step or value % step:
                below = max(value // step, 1) * step
                raise ConfigError(
                    f"the video {name} is {value} pixels; expected a multiple of {step}, e.g. {below} or {below + step}"
                )
        return height // VAE_STRIDE, width // VAE_STRIDE

    def token_grid(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Rows and columns of one latent frame's tokens."""
        h, w = self.latent_size(height, width)
        return h // self.dit.patch[1], w // self.dit.patch[2]

    def frame_tokens(self, height: int | None = None, width: int | None = None) -> int:
        """Tokens of one latent frame."""
        rows, columns = self.token_grid(height, width)
        return rows * columns

    def geometry(
        self, block: int | None = None, height: int | None = None, width: int | None = None
    ) -> BlockGeometry:
        """Attention blocks of one frame."""
        return BlockGeometry(self.frame_tokens(height, width), block or self.block, block or self.block)


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "tiny": Preset(
            name="tiny",
            dit=DiTConfig(dim=128, ffn_dim=512, heads=2, layers=6, text_dim=64, text_len=64),
            vae=TINY_VAE,
            text=UMT5_TINY,
            height=128,
            width=128,
            block=32,
        ),
        "wan-1.3b": Preset(
            name="wan-1.3b",
            dit=DiTConfig(dim=1536, ffn_dim=8960, heads=12, layers=30, text_dim=4096, text_len=512),
            vae=LIGHT_VAE,
            text=UMT5_XXL,
            height=512,
            width=768,
            block=64,
        ),
        "wan-14b": Preset(
            name="wan-14b",
            dit=DiTConfig(dim=5120, ffn_dim=13824, heads=40, layers=40, text_dim=4096, text_len=512),
            vae=LIGHT_VAE,
            text=UMT5_XXL,
            height=480,
            width=832,
            block=64,
        ),
    }
)


def preset(name: str) -> Preset:
    """The preset called `name`.

    Raises:
        ConfigError: no such preset; the message lists the valid ones.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def video_frames(latent_frames: int) -> int:
    """Pixel frames that `latent_frames` decode to: the first gives one, every later one four."""
    return 0 if latent_frames == 0 else 4 * latent_frames - 3


def planned_latents(frames: int, chunk_frames: int = CHUNK_FRAMES) -> int:
    """Latent frames of the whole chunks that give at least `frames` frames of video."""
    latents = 1 + -(-(frames - 1) // 4)
    return -(-latents // chunk_frames) * chunk_frames
