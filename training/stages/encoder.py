# mypy: allow-untyped-calls, no-warn-return-any
"""The video encoder, derived and not trained: weights with which Wan's encoder computes the latents' PCA.

The latents are a linear map of patches of 4 x 8 x 8 pixels, and what stands between a frame and a latent in Wan's
encoder can be linear: residual blocks and the attention in the middle add nothing, strided convolutions see one patch
of 2 x 2 each, temporal ones one pair of frames. Widths bound how much of a patch can pass, so that each of them passes
the directions that the latents depend on most, in the clips' own distribution.

The head is a norm and a SiLU. Features reach it as an offset plus values that sum to zero over the channels: the norm
then divides by all but a constant, the SiLU sees large numbers only, and both are nearly linear.

A clip's first frame passes the temporal convolutions by and stands for four frames at rest. Each pair of frames is
therefore passed on as its mean, and as differences, which are zero at rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightforcing_ref.decoders.layers import (
    LATENT_MEAN,
    LATENT_STD,
    CausalConv3d,
    ChannelNorm,
    FrameAttention,
    ResidualBlock,
)
from lightforcing_ref.decoders.vae_encoder import Downsample, VAEEncoder
from lightforcing_ref.dimensions import VAEConfig
from training.data.latents import FRAME_STRIDE, STRIDE, PatchPCA, patches

__all__ = ["derive_encoder"]

Frames = npt.NDArray[np.uint8]
MEANS, DIFFERENCES = 12, 4
"""Channels behind the first temporal convolution."""
LATE_MEANS, LATE_DIFFERENCES = 20, 6
"""Channels before the second one; behind it the means stay, and all other channels are differences."""
INSIDE, ADDED = 1e-2, 1e-6
"""Size of the weights within, and at the end of, the branches that add nothing."""
OFFSET = 32.0
"""In units of the features, which are of the size of the latents."""
SLOPE = 16.0
"""What the head's SiLU sees of the offset."""


class _Features:
    """Functionals of a patch, and samples of it, in the features that are left of it.

    Args:
        rows: `[16, ...]`, the latents as functionals.
        samples: `[n, ...]`.
    """

    def __init__(self, rows: Tensor, samples: Tensor) -> None:
        self.rows, self.samples = rows, samples

    def narrowed(self, dims: int, width: int) -> Tensor:
        """Replace the last `dims` axes by the `width` directions that the functionals depend on most.

        Returns:
            the map from those axes to the features, `[width, ...]`.
        """
        shape = self.rows.shape[-dims:]
        rows, samples = (x.flatten(-dims) for x in (self.rows, self.samples))
        flat = samples.reshape(-1, samples.shape[-1])
        values, vectors = torch.linalg.eigh(flat.T @ flat / len(flat))
        scale = values.clamp_min(1e-9 * float(values[-1])).sqrt()
        root, inverse = (vectors * scale) @ vectors.T, (vectors / scale) @ vectors.T
        directions = torch.linalg.svd(rows.reshape(-1, rows.shape[-1]) @ root, full_matrices=False).Vh[:width]
        down, up = directions @ inverse, root @ directions.T
        self.rows, self.samples = rows @ up, samples @ down.T
        return down.unflatten(1, shape)


def _patched(x: Tensor) -> Tensor:
    """`[n, t, h, w, C]` to `[n, t, h / 2, w / 2, C, 2, 2]`."""
    return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 1, 2, 4, 6, 3, 5)


def _paired(features: _Features) -> tuple[_Features, _Features]:
    """The means and half the differences of pairs of frames, of features `[n, t, ...]`."""
    rows, samples = (x.unflatten(1, (-1, 2)) for x in (features.rows, features.samples))
    means = _Features(rows[:, :, 0] + rows[:, :, 1], (samples[:, :, 0] + samples[:, :, 1]) / 2)
    differences = _Features(rows[:, :, 1] - rows[:, :, 0], (samples[:, :, 1] - samples[:, :, 0]) / 2)
    return means, differences


def _joined(*parts: _Features) -> _Features:
    return _Features(
        torch.cat([part.rows for part in parts], -1), torch.cat([part.samples for part in parts], -1)
    )


def _start_linear(model: nn.Module) -> None:
    """Zero all weights but those that pass channels on: residual blocks keep their input, attention adds nothing.

    Next to nothing, in truth: a file with tensors of zeros is taken for a damaged one.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(cast(Tensor, module.bias))
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, ResidualBlock):
            inner, outer = module.residual[2], module.residual[6]
            if isinstance(module.shortcut, CausalConv3d):
                kept = module.shortcut.in_channels
                module.shortcut.weight[:kept, :, 0, 0, 0] = torch.eye(kept, dtype=torch.float64)
        elif isinstance(module, FrameAttention):
            inner, outer = module.to_qkv, module.proj
        else:
            continue
        for layer, size in ((inner, INSIDE), (outer, ADDED)):
            nn.init.normal_(cast(nn.Conv3d, layer).weight, std=size, generator=generator)


def _balanced(width: int) -> Tensor:
    """An orthonormal basis of the vectors of `width` channels that sum to zero, `[width, width - 1]`."""
    square = torch.eye(width, dtype=torch.float64)
    square[:, 0] = 1.0
    return torch.linalg.qr(square).Q[:, 1:]


@torch.no_grad()
def derive_encoder(pca: PatchPCA, clips: Iterable[Frames], config: VAEConfig) -> VAEEncoder:
    """The encoder whose latents are those of `pca`, as nearly as its widths allow.

    Args:
        clips: uint8 `[1 + 4 n, H, W, 3]` each; they say which directions matter.

    Raises:
        ValueError: there are no clips.
    """
    drawn = [patches(clip).reshape(-1, FRAME_STRIDE, STRIDE, STRIDE, 3) for clip in clips]
    if not drawn:
        raise ValueError("no clips to derive the encoder for; expected at least one")
    shape = (-1, FRAME_STRIDE, STRIDE, STRIDE, 3)
    rows = torch.from_numpy(pca.components / pca.scale[:, None]).double()
    samples = torch.from_numpy(np.concatenate(drawn)).double()
    model = VAEEncoder(config).double().eval()
    _start_linear(model)
    encoder = model.encoder
    colours = encoder.conv1.in_channels
    encoder.conv1.weight[:colours, :, -1, 1, 1] = torch.eye(colours, dtype=torch.float64)
    first, second, third = (layer for layer in encoder.downsamples if isinstance(layer, Downsample))

    here = _Features(_patched(rows.reshape(shape)), _patched(samples))
    _shrink(first, here.narrowed(3, config.dim))
    here = _Features(_patched(here.rows), _patched(here.samples))
    _shrink(second, here.narrowed(3, MEANS))
    means, differences = _paired(here)
    time = cast(nn.Conv3d, second.time_conv)
    _pass_on(time, torch.eye(MEANS, dtype=torch.float64), differences.narrowed(1, DIFFERENCES))
    still, moving = (
        _Features(_patched(x.rows)[:, :, 0, 0], _patched(x.samples)[:, :, 0, 0]) for x in (means, differences)
    )
    lower, upper = still.narrowed(3, LATE_MEANS), moving.narrowed(3, LATE_DIFFERENCES)

    width = config.widths[0]
    basis = _balanced(width)
    third_shrink = torch.zeros(width - 1, MEANS + DIFFERENCES, 2, 2, dtype=torch.float64)
    third_shrink[:LATE_MEANS, :MEANS] = lower
    third_shrink[LATE_MEANS : LATE_MEANS + LATE_DIFFERENCES, MEANS:] = upper
    _shrink(third, torch.einsum("cf,fiyx->ciyx", basis, third_shrink))
    cast(Tensor, cast(nn.Conv2d, third.resample[1]).bias).fill_(OFFSET)
    late_means, late_differences = _paired(still)
    rest = _joined(
        _Features(late_differences.rows[:, 0], late_differences.samples[:, 0]),
        *(_Features(moving.rows[:, time], moving.samples[:, time]) for time in (0, 1)),
    )
    others = rest.narrowed(1, width - 1 - LATE_MEANS)
    taps = torch.zeros(2, width - 1, width - 1, dtype=torch.float64)
    taps[:, :LATE_MEANS, :LATE_MEANS] = torch.eye(LATE_MEANS, dtype=torch.float64) / 2
    by_mean, by_first, by_second = others.split((LATE_MEANS, LATE_DIFFERENCES, LATE_DIFFERENCES), 1)
    late = slice(LATE_MEANS, LATE_MEANS + LATE_DIFFERENCES)
    taps[0, LATE_MEANS:, :LATE_MEANS], taps[1, LATE_MEANS:, :LATE_MEANS] = -by_mean / 2, by_mean / 2
    taps[0, LATE_MEANS:, late], taps[1, LATE_MEANS:, late] = by_first, by_second
    late_time = cast(nn.Conv3d, third.time_conv)
    late_time.weight[:, :, 1:, 0, 0] = torch.einsum("cf,tfg,dg->cdt", basis, taps, basis)
    cast(Tensor, late_time.bias).fill_(OFFSET)
    final = torch.cat([late_means.rows[:, 0], rest.rows], 1)
    _read_out(model, final @ basis.T, -rows @ torch.from_numpy(pca.mean).double())
    return model.float()


def _shrink(layer: Downsample, kernel: Tensor) -> None:
    """Let a strided convolution apply `kernel` `[out, in, 2, 2]` to each patch."""
    cast(nn.Conv2d, layer.resample[1]).weight[: kernel.shape[0], : kernel.shape[1], :2, :2] = kernel


def _pass_on(conv: nn.Conv3d, means: Tensor, differences: Tensor) -> None:
    """Let a temporal convolution give means, then half the differences, of pairs of frames."""
    kept, late = len(means), len(differences)
    conv.weight[:kept, :kept, 1:, 0, 0] = means[..., None] / 2
    conv.weight[kept : kept + late, :kept, 1, 0, 0] = -differences / 2
    conv.weight[kept : kept + late, :kept, 2, 0, 0] = differences / 2


def _read_out(model: VAEEncoder, rows: Tensor, bias: Tensor) -> None:
    """Let the head give latents: `rows` `[16, channels]` of the features, plus `bias`."""
    norm, _, head = model.encoder.head
    cast(ChannelNorm, norm).gamma.fill_(SLOPE)
    count = model.config.z_dim
    std, mean = (torch.tensor(values, dtype=torch.float64) for values in (LATENT_STD, LATENT_MEAN))
    conv = cast(CausalConv3d, head)
    weight = rows * std[:, None] * OFFSET / SLOPE
    conv.weight[:count, :, -1, 1, 1] = weight
    cast(Tensor, conv.bias)[:count] = bias * std + mean  # the offset's part is zero, as rows sum to zero
    model.conv1.weight[:, :, 0, 0, 0] = torch.eye(2 * count, dtype=torch.float64)
