"""The Wan autoencoder as published, literally: frame by frame, tap by tap."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN = [
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
]
STD = [
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
]


class Published:
    """Decoder and encoder computed frame by frame from a state dict; a clip is a list of frames `[C, h, w]`."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def conv(self, key: str, clip: list[Tensor]) -> list[Tensor]:
        """Causal convolution as a sum over its taps in time, the last of which is the current frame."""
        weight, bias = self.state[f"{key}.weight"], self.state[f"{key}.bias"]
        if weight.ndim == 4:
            weight = weight[:, :, None]
        taps, padding = weight.shape[2], weight.shape[3] // 2
        out = []
        for now in range(len(clip)):
            total = bias[:, None, None].expand(-1, *clip[0].shape[1:])
            for tap in range(taps):
                then = now - (taps - 1) + tap
                if then >= 0:
                    total = total + F.conv2d(clip[then][None], weight[:, :, tap], padding=padding)[0]
            out.append(total)
        return out

    def norm(self, key: str, clip: list[Tensor]) -> list[Tensor]:
        gamma = self.state[f"{key}.gamma"].reshape(-1, 1, 1)
        return [math.sqrt(len(frame)) * gamma * frame / frame.square().sum(0).sqrt() for frame in clip]

    def silu(self, clip: list[Tensor]) -> list[Tensor]:
        return [frame / (1 + torch.exp(-frame)) for frame in clip]

    def residual(self, key: str, clip: list[Tensor]) -> list[Tensor]:
        x = self.conv(f"{key}.residual.2", self.silu(self.norm(f"{key}.residual.0", clip)))
        x = self.conv(f"{key}.residual.6", self.silu(self.norm(f"{key}.residual.3", x)))
        skip = self.conv(f"{key}.shortcut", clip) if f"{key}.shortcut.weight" in self.state else clip
        return [a + b for a, b in zip(x, skip, strict=True)]

    def attention(self, key: str, clip: list[Tensor]) -> list[Tensor]:
        out = []
        for frame, qkv in zip(clip, self.conv(f"{key}.to_qkv", self.norm(f"{key}.norm", clip)), strict=True):
            q, k, v = qkv.reshape(3, len(frame), -1)
            mixed = torch.zeros_like(v)
            for pixel in range(q.shape[1]):
                weights = torch.softmax(q[:, pixel] @ k / math.sqrt(len(q)), dim=0)
                mixed[:, pixel] = v @ weights
            out.append(frame + self.conv(f"{key}.proj", [mixed.reshape(frame.shape)])[0])
        return out

    def upsample(self, key: str, clip: list[Tensor]) -> list[Tensor]:
        if f"{key}.time_conv.weight" in self.state:
            first, rest = clip[:1], clip[1:]
            clip = list(first)
            for pair in self.conv(f"{key}.time_conv", rest):
                clip += [pair[: len(pair) // 2], pair[len(pair) // 2 :]]
        larger = [frame.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2) for frame in clip]
        return self.conv(f"{key}.resample.1", larger)

    def decode(self, latents: Tensor) -> Tensor:
        mean, std = (torch.tensor(values, dtype=latents.dtype)[:, None, None] for values in (MEAN, STD))
        clip = self.conv("conv2", [frame * std + mean for frame in latents])
        clip = self.conv("decoder.conv1", clip)
        clip = self.residual("decoder.middle.0", clip)
        clip = self.attention("decoder.middle.1", clip)
        clip = self.residual("decoder.middle.2", clip)
        for index in range(15):
            layer = self.upsample if index in (3, 7, 11) else self.residual
            clip = layer(f"decoder.upsamples.{index}", clip)
        clip = self.conv("decoder.head.2", self.silu(self.norm("decoder.head.0", clip)))
        return torch.stack(clip)

    def downsample(self, key: str, clip: list[Tensor]) -> list[Tensor]:
        """Each frame on its own; then every second frame with the two before it, the first one as it is."""
        weight, bias = self.state[f"{key}.resample.1.weight"], self.state[f"{key}.resample.1.bias"]
        smaller = []
        for frame in clip:
            _, height, width = frame.shape
            padded = torch.zeros(len(frame), height + 1, width + 1, dtype=frame.dtype)
            padded[:, :height, :width] = frame
            smaller.append(F.conv2d(padded[None], weight, bias, stride=2)[0])
        if f"{key}.time_conv.weight" not in self.state:
            return smaller
        taps, bias = self.state[f"{key}.time_conv.weight"], self.state[f"{key}.time_conv.bias"]
        out = smaller[:1]
        for now in range(2, len(smaller), 2):
            total = bias[:, None, None]
            for tap in range(3):
                matrix = taps[:, :, tap, 0, 0]
                total = total + torch.einsum("oc,chw->ohw", matrix, smaller[now - 2 + tap])
            out.append(total)
        return out

    def encode(self, video: Tensor) -> Tensor:
        clip = self.conv("encoder.conv1", list(video))
        for index in range(11):
            layer = self.downsample if index in (2, 5, 8) else self.residual
            clip = layer(f"encoder.downsamples.{index}", clip)
        clip = self.residual("encoder.middle.0", clip)
        clip = self.attention("encoder.middle.1", clip)
        clip = self.residual("encoder.middle.2", clip)
        clip = self.conv("encoder.head.2", self.silu(self.norm("encoder.head.0", clip)))
        mean, std = (torch.tensor(values, dtype=video.dtype)[:, None, None] for values in (MEAN, STD))
        return torch.stack([(moments[:16] - mean) / std for moments in self.conv("conv1", clip)])
