"""The compiled decoder's modules: channels last outside, the reference's numbers inside."""

from __future__ import annotations

import pytest
import torch

from export.backends.inductor.decoder import LATENT_STATISTICS, channels_last, vae_first, vae_next
from export.backends.inductor.encoder import VAE_ENCODERS
from export.request.geometry import StepPlan
from lightforcing_ref.decoders.tae import video_decoder
from lightforcing_ref.decoders.vae import to_uint8
from lightforcing_ref.decoders.vae_encoder import VAEEncoder
from lightforcing_ref.dimensions import TINY_TAE, TINY_VAE, DecoderConfig
from tests.export.backends.test_inductor import request_for


@pytest.fixture(scope="module")
def plan() -> StepPlan:
    return request_for(height=64, width=64).plan


@pytest.mark.parametrize("config", [TINY_VAE, TINY_TAE], ids=["vae", "tae"])
def test_channels_last_decodes_as_the_reference(config: DecoderConfig, plan: StepPlan) -> None:
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    reference = video_decoder(config).requires_grad_(False)
    stored = {f"decoder.{name}": channels_last(value) for name, value in reference.state_dict().items()}
    stored |= {f"decoder.{name}": torch.tensor(values) for name, values in LATENT_STATISTICS.items()}
    latents = [torch.randn(config.z_dim, 1, *plan.latent_size, generator=generator) for _ in range(2)]
    specs = reference.cache_specs(*plan.latent_size)
    caches = [torch.zeros(spec.shape) for spec in specs]
    own = [channels_last(cache) for cache in caches]
    for turn, make in enumerate((vae_first, vae_next)):
        module = make(config, torch.float32, plan)
        history = own if turn else []
        weights = [stored[name] for name in module.weights.values()]
        given = (latents[turn], *history, *weights)
        assert [tuple(tensor.shape) for tensor in given] == [spec.shape for spec in module.inputs]
        frames, *written = module.examples("cpu")[len(module.inputs) :]
        module(*given, frames, *written)
        if turn:
            video, caches = reference.decode_next(latents[turn], caches)
        else:
            video, caches = reference.decode_first(latents[turn])
        error = (to_uint8(video).int() - frames.int()).abs()
        assert int(error.max()) <= 1 and float((error > 0).float().mean()) < 1e-3
        kept = [cache for cache, spec in zip(caches, specs, strict=True) if turn or spec.written_by_first]
        for cache, mine in zip(kept, written, strict=True):
            torch.testing.assert_close(channels_last(cache), mine, rtol=1e-4, atol=1e-4)
        for spec, mine in zip(module.outputs[1:], written, strict=True):
            own[int(spec.name.partition(".")[2])] = mine


def test_channels_last_encodes_as_the_reference(plan: StepPlan) -> None:
    torch.manual_seed(0)
    reference = VAEEncoder(TINY_VAE).requires_grad_(False)
    stored = {f"encoder.{name}": channels_last(value) for name, value in reference.state_dict().items()}
    stored |= {f"encoder.{name}": torch.tensor(values) for name, values in LATENT_STATISTICS.items()}
    video = torch.rand(5, 3, plan.height, plan.width, generator=torch.Generator().manual_seed(1)) * 2 - 1
    own: list[torch.Tensor] = []
    caches: list[torch.Tensor] = []
    for turn, make in enumerate(VAE_ENCODERS.values()):
        module = make(TINY_VAE, torch.float32, plan)
        given = (video[1:] if turn else video[:1], *own, *(stored[name] for name in module.weights.values()))
        assert [tuple(tensor.shape) for tensor in given] == [spec.shape for spec in module.inputs]
        latent, *own = module.examples("cpu")[len(module.inputs) :]
        module(*given, latent, *own)
        wanted, caches = (
            reference.encode_next(video[1:], caches) if turn else reference.encode_first(video[:1])
        )
        torch.testing.assert_close(latent, wanted, rtol=1e-4, atol=1e-4)
        for cache, mine in zip(caches, own, strict=True):
            torch.testing.assert_close(channels_last(cache), mine, rtol=1e-4, atol=1e-4)
