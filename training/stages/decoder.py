"""The decoder stages: from PCA latents to pixels, through the whole-clip decode, by Wan's decoder or by a tiny one.

A window may begin anywhere in a clip; it is encoded as a clip of its own, so its first latent stands for one frame, as
the decoder's first latent does. Most steps see a crop around the object, some see whole frames.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightforcing_ref.decoders.layers import CausalConv3d
from lightforcing_ref.decoders.tae import VideoDecoder, video_decoder
from lightforcing_ref.dimensions import DecoderConfig
from training.config import DataConfig, StageConfig
from training.data.clips import FRAMES, SIZE, Clip, random_clip
from training.data.latents import STRIDE, PatchPCA
from training.device import tensor
from training.runner import Stage

__all__ = ["WINDOWS", "DecoderStage", "use_planar_convolutions", "window"]

WINDOWS = ((3, 6, 0.5), (5, 5, 0.3), (7, 6, 0.15), (3, 16, 0.05))
"""(latent frames, latent pixels per side, probability) of a training window."""
LATENT_NOISE = 0.2
"""Standard deviation of noise on the latents: the transformer's output is not exact."""
EDGE_WEIGHT = 4.0
"""Extra weight of pixels that differ from the clip's ground."""


def use_planar_convolutions(decoder: nn.Module) -> None:
    """Let the decoder's causal convolutions run as planar ones over stacked frames, with the same result.

    PyTorch's CPU build runs a 3-D convolution of batch 1 without oneDNN; this is 3 to 4 times faster.
    """
    for part in decoder.modules():
        if isinstance(part, CausalConv3d):
            part.forward = partial(_planar, part)  # type: ignore[method-assign]


def _planar(conv: CausalConv3d, x: Tensor) -> Tensor:
    """`CausalConv3d.forward` on `[1, C, t, h, w]`: the kernel's time taps become input channels."""
    taps, frames = conv.kernel_size[0], x.shape[2]
    images = x[0].transpose(0, 1)
    if taps > 1:
        padded = F.pad(images, (0, 0, 0, 0, 0, 0, taps - 1, 0))
        images = torch.cat([padded[tap : tap + frames] for tap in range(taps)], dim=1)
    weight = conv.weight.transpose(1, 2).flatten(1, 2)
    height, width = conv.kernel_size[1] // 2, conv.kernel_size[2] // 2
    layout = torch.channels_last
    out = F.conv2d(
        images.contiguous(memory_format=layout),
        weight.contiguous(memory_format=layout),
        conv.bias,
        padding=(height, width),
    )
    return out.transpose(0, 1)[None]


def window(generator: np.random.Generator) -> tuple[int, int]:
    """Latent frames, and latent pixels per side, of a training window."""
    count, side, _ = WINDOWS[generator.choice(len(WINDOWS), p=[odds for _, _, odds in WINDOWS])]
    return count, side


class DecoderStage(Stage):
    """Mean absolute error, with more weight on the object."""

    name = "decoder"

    def __init__(self, config: StageConfig, data: DataConfig, pca: PatchPCA, vae: DecoderConfig) -> None:
        self.config, self.data, self.pca = config, data, pca
        self.module: VideoDecoder = video_decoder(vae)
        *_, last = (name for name, part in self.module.named_modules() if hasattr(part, "kernel_size"))
        self.adam_only = (last,)
        use_planar_convolutions(self.module)

    def sample(self, generator: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Latents `[n, 16, s, s]`, pixels `[1 + 4 (n - 1), 3, 8 s, 8 s]` in -1..1, and where the object is."""
        clip = random_clip(generator, self.data.kinds, held_out=bool(generator.random() < 0.1))
        count, side = window(generator)
        length = 1 + 4 * (count - 1)
        first = int(generator.integers(0, FRAMES - length + 1))
        return self.cropped(generator, clip, slice(first, first + length), side)

    def cropped(
        self,
        generator: np.random.Generator,
        clip: Clip,
        part: slice,
        side: int,
        latents: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A crop of `side` latent pixels near the object.

        Args:
            part: pixel frames.
            latents: of these frames; None = encode them, with noise.
        """
        frames = clip.render(part.start, part.stop - part.start)
        x, y, _ = clip.path[(part.start + part.stop) // 2]
        wander = generator.normal(0, 12, size=2) - side * STRIDE / 2
        column, row = (
            int(np.clip((centre + off) // STRIDE, 0, SIZE // STRIDE - side))
            for centre, off in zip((x, y), wander, strict=True)
        )
        crop = frames[:, row * STRIDE : (row + side) * STRIDE, column * STRIDE : (column + side) * STRIDE]
        if latents is None:
            latents = tensor(self.pca.encode(crop))
            latents = latents + LATENT_NOISE * torch.randn_like(latents)
        else:
            latents = latents[:, :, row : row + side, column : column + side]
        pixels = tensor(crop.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
        ground = tensor(frames[0, 0, 0].astype(np.float32) / 127.5 - 1)
        is_object = ((pixels - ground[:, None, None]).abs().amax(1, keepdim=True) > 0.1).float()
        return latents, pixels, is_object

    def loss(self, generator: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        total, error = torch.zeros(()), 0.0
        for _ in range(self.config.batch):
            latents, pixels, is_object = self.sample(generator)
            video = self.module.decode(latents)
            near = F.max_pool2d(is_object, 5, 1, 2)
            weight = 1 + EDGE_WEIGHT * near
            total = total + (weight * (video - pixels).abs()).mean() / weight.mean()
            error += float((video.detach().clamp(-1, 1) - pixels).square().mean())
        psnr = -10 * np.log10(error / self.config.batch / 4)
        return total / self.config.batch, {"psnr": float(psnr)}
