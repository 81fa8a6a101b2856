"""The video encoder of a bundle as ONNX files: the first frame of a clip, and four frames at a time after it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from export.progress import StepCallback, no_steps
from export.request.geometry import StepPlan
from lightforcing_ref.decoders.vae_encoder import VAEEncoder
from runtime.bundle import ENCODER_COMPONENTS

from .components import TRACING, cache_out
from .tracing import save_model, trace

__all__ = ["EncodeFirst", "EncodeNext", "NormByWeights", "write_vae_encoder"]


class EncodeFirst(nn.Module):
    """Encoding of the first frame of a clip; returns every cache."""

    def __init__(self, encoder: VAEEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, video: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.encoder.encode_first(video.to(self.encoder.dtype))


class NormByWeights(nn.Module):
    """`LatentNorm` with the statistics of the latents among the weights, for graphs without constants."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.empty(channels))
        self.std = nn.Parameter(torch.empty(channels))

    def forward(self, latents: Tensor) -> Tensor:
        mean, std = (values[:, None, None, None] for values in (self.mean, self.std))
        return (latents - mean) / std


class EncodeNext(nn.Module):
    """Encoding of the frames of a later latent frame."""

    def __init__(self, encoder: VAEEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, video: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return self.encoder.encode_next(video.to(self.encoder.dtype), caches)


def write_vae_encoder(
    folder: Path, encoder: VAEEncoder, plan: StepPlan, progress: StepCallback = no_steps
) -> list[str]:
    """Write the two graphs of the streaming encoder.

    They compute in the type of the encoder's weights, which is that of the caches. The video, in -1..1, and the latent
    are float32, and so is the latent's normalisation.
    """
    progress(TRACING, 0, 1)
    height, width = plan.latent_size
    caches = encoder.cache_specs(height, width)
    scale, factor = encoder.config.spatial_factor, encoder.config.temporal_factor
    outputs = ["latent", *(cache_out(cache) for cache in caches)]
    frame = torch.zeros(1, 3, scale * height, scale * width)
    first, following = ENCODER_COMPONENTS
    graphs = {
        following: trace(
            EncodeNext(encoder),
            (
                frame.expand(factor, -1, -1, -1).contiguous(),
                [torch.zeros(cache.shape, dtype=encoder.dtype) for cache in caches],
            ),
            input_names=["video", *(cache.name for cache in caches)],
            output_names=outputs,
            metadata={"lightforcing.component": following},
        ),
        first: trace(
            EncodeFirst(encoder),
            (frame,),
            input_names=["video"],
            output_names=outputs,
            metadata={"lightforcing.component": first},
        ),
    }
    for name, graph in graphs.items():
        save_model(graph, folder / f"{name}.onnx", f"{name}.weights", progress)
    return [f"{name}.{kind}" for name in graphs for kind in ("onnx", "weights")]
