"""The streaming encoder as Inductor compiles it, in the order of the decoder: channels last."""

from __future__ import annotations

from functools import partial
from typing import Final

import torch

from export.graph.encoder import EncodeFirst, EncodeNext, NormByWeights
from export.request.geometry import StepPlan
from lightforcing_ref.decoders.vae_encoder import VAEEncoder
from lightforcing_ref.dimensions import VAEConfig
from runtime.bundle import ENCODER_COMPONENTS

from .decoder import ChannelsLast, cache_specs, used
from .modules import Compiled, tensor_spec

__all__ = ["VAE_ENCODERS"]


def _encoder(config: VAEConfig, dtype: torch.dtype, plan: StepPlan, *, first: bool) -> Compiled:
    with torch.device("meta"):
        encoder = VAEEncoder(config).to(dtype)
        encoder.scale = NormByWeights(config.z_dim)
        encoder.requires_grad_(False)
    inputs, outputs = cache_specs(encoder.cache_specs(*plan.latent_size), dtype, first=first)
    count = 1 if first else config.temporal_factor
    video = tensor_spec("video", (count, 3, plan.height, plan.width), torch.float32)
    latent = tensor_spec("latent", (config.z_dim, 1, *plan.latent_size), torch.float32)
    body = ChannelsLast(EncodeFirst(encoder) if first else EncodeNext(encoder))
    return Compiled(body, [video, *inputs], [latent, *outputs], body.weights(used(first=first)))


VAE_ENCODERS: Final = {
    name: partial(_encoder, first=first)
    for name, first in zip(ENCODER_COMPONENTS, (True, False), strict=True)
}
"""Encoding of the first frame and of later ones, by component: from widths, the weights' type and a plan."""
