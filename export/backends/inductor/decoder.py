"""The streaming decoder as Inductor compiles it: channels last, so that no convolution changes the order of anything.

Convolutions on tensor cores read images whose channels lie side by side. Of images that lie otherwise the library
makes a copy before each convolution and another one behind it. Which order a convolution works in is decided by how its
weight lies; therefore weights and caches are handed in with their channels last, and everything in between follows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from export.graph.components import ScaleByWeights, VAEFirst, VAENext
from export.request.geometry import StepPlan
from lightforcing_ref.decoders.layers import LATENT_MEAN, LATENT_STD, CacheSpec
from lightforcing_ref.decoders.tae import VideoDecoder, video_decoder
from lightforcing_ref.decoders.vae import LatentScale
from lightforcing_ref.dimensions import DecoderConfig

from .modules import Compiled, tensor_spec, weights_of

__all__ = ["LATENT_STATISTICS", "channels_last", "vae_first", "vae_next"]

LATENT_STATISTICS = {"scale.mean": LATENT_MEAN, "scale.std": LATENT_STD}
"""Weights of the compiled decoder that are no weights of the model's."""


def channels_last(tensor: Tensor) -> Tensor:
    """A weight `[O, C, ...]` or a cache `[1, C, ...]` as packages take it: `[O, ..., C]`; fewer than four axes stay."""
    return tensor.movedim(1, -1).contiguous() if tensor.ndim > 3 else tensor


def _channels_second(tensor: Tensor) -> Tensor:
    """The inverse of `channels_last`, as a view."""
    return tensor.movedim(-1, 1) if tensor.ndim > 3 else tensor


class _Decode(nn.Module):
    """The decoder in the type of its weights, from float32 latents, which are denormalised in float32.

    Its parameters and its caches have their channels last.
    """

    def __init__(self, decoder: VideoDecoder, caches: Sequence[CacheSpec] | None) -> None:
        super().__init__()
        self.decode = VAENext(decoder) if caches is None else VAEFirst(decoder, caches)
        decoder.entry.register_forward_pre_hook(_narrow)
        for parameter in self.decode.parameters():
            parameter.data = channels_last(parameter.data)

    def forward(self, latent: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        weights = {name: _channels_second(weight) for name, weight in self.decode.named_parameters()}
        history = ([_channels_second(cache) for cache in caches],) if caches else ()
        frames, written = functional_call(self.decode, weights, (latent, *history))
        return (frames, *(channels_last(cache) for cache in written))


def _narrow(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].to(cast(Tensor, module.weight).dtype), *args[1:])


def _decoder(config: DecoderConfig, dtype: torch.dtype, plan: StepPlan, *, first: bool) -> Compiled:
    with torch.device("meta"):
        decoder = video_decoder(config).to(dtype)
        if isinstance(decoder.scale, LatentScale):
            decoder.scale = ScaleByWeights(config.z_dim)
        decoder.requires_grad_(False)
    height, width = plan.latent_size
    caches = decoder.cache_specs(height, width)
    shapes = {cache.name: channels_last(torch.empty(cache.shape, device="meta")).shape for cache in caches}
    latent = tensor_spec("latent", (config.z_dim, 1, height, width), torch.float32)
    count = 1 if first else config.temporal_factor
    frames = tensor_spec("frames", (count, plan.height, plan.width, 3), torch.uint8)
    outputs = [
        tensor_spec(cache.name.replace("cache.", "cache_out."), shapes[cache.name], dtype)
        for cache in caches
        if cache.written_by_first or not first
    ]
    inputs = [] if first else [tensor_spec(name, shape, dtype) for name, shape in shapes.items()]
    body = _Decode(decoder, caches if first else None)
    # Time is not upsampled in the first frame.
    wanted = re.compile(r"(?!.*\.time_conv\.).*" if first else ".*")
    return Compiled(body, [latent, *inputs], [frames, *outputs], weights_of(body, "decode.", wanted))


def vae_first(config: DecoderConfig, dtype: torch.dtype, plan: StepPlan) -> Compiled:
    """Decoding of the first latent frame."""
    return _decoder(config, dtype, plan, first=True)


def vae_next(config: DecoderConfig, dtype: torch.dtype, plan: StepPlan) -> Compiled:
    """Decoding of a later latent frame."""
    return _decoder(config, dtype, plan, first=False)
