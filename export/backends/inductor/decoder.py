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

from export.graph.components import ScaleByWeights, VAEFirst, VAENext, cache_out
from export.request.geometry import StepPlan
from lightforcing_ref.decoders.layers import LATENT_MEAN, LATENT_STD, CacheSpec
from lightforcing_ref.decoders.tae import video_decoder
from lightforcing_ref.decoders.vae import LatentScale
from lightforcing_ref.dimensions import DecoderConfig
from runtime.bundle import TensorSpec

from .modules import Compiled, tensor_spec, weights_of

__all__ = [
    "LATENT_STATISTICS",
    "ChannelsLast",
    "cache_specs",
    "channels_last",
    "used",
    "vae_first",
    "vae_next",
]

LATENT_STATISTICS = {"scale.mean": LATENT_MEAN, "scale.std": LATENT_STD}
"""Weights of the compiled decoder that are no weights of the model's."""


def channels_last(tensor: Tensor) -> Tensor:
    """A weight `[O, C, ...]` or a cache `[1, C, ...]` as packages take it: `[O, ..., C]`; fewer than four axes stay."""
    return tensor.movedim(1, -1).contiguous() if tensor.ndim > 3 else tensor


def _channels_second(tensor: Tensor) -> Tensor:
    """The inverse of `channels_last`, as a view."""
    return tensor.movedim(-1, 1) if tensor.ndim > 3 else tensor


class ChannelsLast(nn.Module):
    """A streaming network whose parameters and caches have their channels last.

    Args:
        network: takes a tensor and, but for the first frame, the caches; returns a tensor and the caches written.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        for parameter in network.parameters():
            parameter.data = channels_last(parameter.data)

    def forward(self, given: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        weights = {name: _channels_second(weight) for name, weight in self.network.named_parameters()}
        history = ([_channels_second(cache) for cache in caches],) if caches else ()
        out, written = functional_call(self.network, weights, (given, *history))
        return (out, *(channels_last(cache) for cache in written))

    def weights(self, wanted: re.Pattern[str]) -> dict[str, str]:
        """Those that are wanted, as `Compiled` takes them; named as in the network."""
        return weights_of(self, "network.", wanted)


def cache_specs(
    caches: Sequence[CacheSpec], dtype: torch.dtype, *, first: bool
) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs of a package that are caches: the first frame reads none, and may not write all."""
    shapes = {cache.name: channels_last(torch.empty(cache.shape, device="meta")).shape for cache in caches}
    outputs = [
        tensor_spec(cache_out(cache), shapes[cache.name], dtype)
        for cache in caches
        if cache.written_by_first or not first
    ]
    inputs = [] if first else [tensor_spec(name, shape, dtype) for name, shape in shapes.items()]
    return inputs, outputs


def used(*, first: bool) -> re.Pattern[str]:
    """The weights that a package reads: in the first frame time is not resampled."""
    return re.compile(r"(?!.*\.time_conv\.).*" if first else ".*")


def _narrow(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Latents are float32, and denormalised as such; from here on it is the type of the weights."""
    return (args[0].to(cast(Tensor, module.weight).dtype), *args[1:])


def _decoder(config: DecoderConfig, dtype: torch.dtype, plan: StepPlan, *, first: bool) -> Compiled:
    with torch.device("meta"):
        decoder = video_decoder(config).to(dtype)
        if isinstance(decoder.scale, LatentScale):
            decoder.scale = ScaleByWeights(config.z_dim)
        decoder.requires_grad_(False)
    decoder.entry.register_forward_pre_hook(_narrow)
    height, width = plan.latent_size
    caches = decoder.cache_specs(height, width)
    inputs, outputs = cache_specs(caches, dtype, first=first)
    latent = tensor_spec("latent", (config.z_dim, 1, height, width), torch.float32)
    count = 1 if first else config.temporal_factor
    frames = tensor_spec("frames", (count, plan.height, plan.width, 3), torch.uint8)
    body = ChannelsLast(VAEFirst(decoder, caches) if first else VAENext(decoder))
    return Compiled(body, [latent, *inputs], [frames, *outputs], body.weights(used(first=first)))


def vae_first(config: DecoderConfig, dtype: torch.dtype, plan: StepPlan) -> Compiled:
    """Decoding of the first latent frame."""
    return _decoder(config, dtype, plan, first=True)


def vae_next(config: DecoderConfig, dtype: torch.dtype, plan: StepPlan) -> Compiled:
    """Decoding of a later latent frame."""
    return _decoder(config, dtype, plan, first=False)
