"""Latents without an encoder: a fixed whitened PCA of space-time patches of 4 frames x 8 x 8 pixels.

As with the Wan VAE, the first latent frame stands for one pixel frame (repeated four times here) and every later one
for four. Latents are normalised: about zero mean and unit variance per channel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["CHANNELS", "FRAME_STRIDE", "STRIDE", "PatchPCA", "patches"]

CHANNELS = 16
FRAME_STRIDE, STRIDE = 4, 8

Array = npt.NDArray[np.float32]


def patches(frames: npt.NDArray[np.uint8]) -> Array:
    """Pixels uint8 `[1 + 4 n, H, W, 3]` to patches in -1..1, `[n + 1, h, w, 4 * 8 * 8 * 3]`.

    Raises:
        ValueError: the number of frames is another.
    """
    if (len(frames) - 1) % FRAME_STRIDE:
        raise ValueError(f"the clip has {len(frames)} frames; expected 1 + a multiple of {FRAME_STRIDE}")
    full = np.concatenate([np.repeat(frames[:1], FRAME_STRIDE - 1, axis=0), frames])
    count, height, width, _ = full.shape
    split = full.reshape(
        count // FRAME_STRIDE, FRAME_STRIDE, height // STRIDE, STRIDE, width // STRIDE, STRIDE, 3
    )
    flat = split.transpose(0, 2, 4, 1, 3, 5, 6).reshape(count // FRAME_STRIDE, height // 8, width // 8, -1)
    return flat.astype(np.float32) / 127.5 - 1


@dataclass(frozen=True)
class PatchPCA:
    """The basis: `mean` `[768]`, orthonormal `components` `[16, 768]`, and `scale` `[16]`, the standard deviations."""

    mean: Array
    components: Array
    scale: Array

    @classmethod
    def fit(cls, clips: Iterable[npt.NDArray[np.uint8]], channels: int = CHANNELS) -> PatchPCA:
        """Fit to the patches of `clips`, each uint8 `[1 + 4 n, H, W, 3]`.

        Raises:
            ValueError: there are no clips.
        """
        size = FRAME_STRIDE * STRIDE * STRIDE * 3
        total, second = np.zeros(size), np.zeros((size, size))
        count = 0
        for frames in clips:
            flat = patches(frames).reshape(-1, size)
            total = total + flat.sum(0, dtype=np.float64)
            second = second + (flat.T @ flat).astype(np.float64)
            count += len(flat)
        if count == 0:
            raise ValueError("no clips to fit the latents to; expected at least one")
        mean = total / count
        values, vectors = np.linalg.eigh(second / count - np.outer(mean, mean))
        largest = np.argsort(values)[::-1][:channels]
        components = vectors[:, largest].T
        # Eigenvectors have no sign of their own: make the entry of largest size positive.
        peaks = np.take_along_axis(components, np.abs(components).argmax(1)[:, None], 1)
        scale = np.sqrt(np.maximum(values[largest], 1e-12))
        return cls(
            mean.astype(np.float32),
            (components * np.sign(peaks)).astype(np.float32),
            scale.astype(np.float32),
        )

    def encode(self, frames: npt.NDArray[np.uint8]) -> Array:
        """Pixels uint8 `[1 + 4 n, H, W, 3]` to latents `[n + 1, 16, H / 8, W / 8]`."""
        latents = (patches(frames) - self.mean) @ (self.components / self.scale[:, None]).T
        return np.ascontiguousarray(latents.transpose(0, 3, 1, 2))

    def decode(self, latents: Array) -> npt.NDArray[np.uint8]:
        """The linear reconstruction: latents `[n + 1, 16, h, w]` to pixels uint8 `[1 + 4 n, 8 h, 8 w, 3]`."""
        count, _, height, width = latents.shape
        patches = (latents.transpose(0, 2, 3, 1) * self.scale) @ self.components + self.mean
        split = patches.reshape(count, height, width, FRAME_STRIDE, STRIDE, STRIDE, 3)
        full = split.transpose(0, 3, 1, 4, 2, 5, 6).reshape(count * FRAME_STRIDE, height * 8, width * 8, 3)
        pixels = np.rint(np.clip((full + 1) * 127.5, 0, 255)).astype(np.uint8)
        return np.concatenate([pixels[:FRAME_STRIDE].mean(0, keepdims=True).astype(np.uint8), pixels[4:]])

    def save(self, path: Path) -> None:
        """Write as safetensors."""
        from safetensors.numpy import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"mean": self.mean, "components": self.components, "scale": self.scale}, path)

    @classmethod
    def load(cls, path: Path) -> PatchPCA:
        """Read what `save` wrote."""
        from safetensors.numpy import load_file

        content = load_file(path)
        return cls(content["mean"], content["components"], content["scale"])
