"""The video encoder: against the published description written out, and streaming against the whole clip."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from lightforcing_ref.checkpoint import load_vae_encoder_state, load_vae_state
from lightforcing_ref.checkpoint.spec import vae_decoder_shapes, vae_encoder_shapes
from lightforcing_ref.decoders.vae import VAEDecoder, to_uint8
from lightforcing_ref.decoders.vae_encoder import VAEEncoder, from_uint8
from lightforcing_ref.dimensions import LIGHT_VAE, TINY_VAE, WAN_VAE, VAEConfig
from lightforcing_ref.errors import CheckpointError
from tests.lightforcing_ref.decoders.published import Published


def make_encoder(config: VAEConfig, dtype: torch.dtype = torch.float64) -> VAEEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        encoder = VAEEncoder(config)
        for name, parameter in encoder.named_parameters():
            if name.endswith("gamma"):
                nn.init.uniform_(parameter, 0.5, 1.5)
    return encoder.to(dtype).eval().requires_grad_(False)


def make_video(frames: int, height: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    video = torch.rand(frames, 3, height, width, generator=generator, dtype=torch.float64) * 2 - 1
    return video.to(dtype)


def stream(encoder: VAEEncoder, video: Tensor, steps: list[int] | None = None) -> Tensor:
    """Encode the first frame, then the others in runs of `steps` latent frames, one by one by default."""
    latent, caches = encoder.encode_first(video[:1])
    latents = [latent]
    factor = encoder.config.temporal_factor
    for part in (
        video[1:].split([factor * step for step in steps] if steps else factor) if len(video) > 1 else ()
    ):
        latent, caches = encoder.encode_next(part, caches)
        latents.append(latent)
    return torch.cat(latents, dim=1).transpose(0, 1)


@pytest.mark.parametrize("config", [TINY_VAE, LIGHT_VAE], ids=["tiny", "light"])
@pytest.mark.parametrize("frames", [1, 5, 13])
def test_encoder_computes_what_is_published(config: VAEConfig, frames: int) -> None:
    encoder, video = make_encoder(config), make_video(frames, 16, 24)
    expected = Published(encoder.state_dict()).encode(video)
    assert expected.shape == (1 + (frames - 1) // 4, 16, 2, 3)
    torch.testing.assert_close(encoder.encode(video), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(stream(encoder, video), expected, rtol=0, atol=1e-12)


@settings(max_examples=12, deadline=None)
@given(
    steps=st.lists(st.integers(1, 3), max_size=3),
    height=st.integers(1, 3),
    width=st.integers(1, 3),
    temporal=st.sampled_from([(True, True), (True, False), (False, True), (False, False)]),
)
def test_streaming_in_runs_of_any_length(
    steps: list[int], height: int, width: int, temporal: tuple[bool, bool]
) -> None:
    config = VAEConfig(dim=4, dim_mult=(1, 1, 2), num_res_blocks=1, temporal_upsample=temporal)
    encoder = make_encoder(config)
    video = make_video(1 + config.temporal_factor * sum(steps), 4 * height, 4 * width)
    whole = encoder.encode(video)
    assert whole.shape == (1 + sum(steps), 16, height, width)
    torch.testing.assert_close(stream(encoder, video, steps), whole, rtol=0, atol=1e-12)


def test_caches_are_as_specified_and_nothing_changes_them() -> None:
    encoder, video = make_encoder(TINY_VAE), make_video(5, 16, 24)
    _, first = encoder.encode_first(video[:1])
    copies = [cache.clone() for cache in first]
    _, later = encoder.encode_next(video[1:], first)
    shapes = [spec.shape for spec in encoder.cache_specs(2, 3)]
    assert [tuple(cache.shape) for cache in first] == shapes
    assert [tuple(cache.shape) for cache in later] == shapes
    assert all(torch.equal(cache, copy) for cache, copy in zip(first, copies, strict=True))
    assert sum(shape[2] == 1 for shape in shapes) == 2, "the temporal downsamplings keep one frame"


def test_what_the_decoder_takes_the_encoder_gives() -> None:
    """Sizes fit for every clip, and the scaling of the one undoes that of the other."""
    encoder, decoder = make_encoder(TINY_VAE), VAEDecoder(TINY_VAE).double()
    video = make_video(9, 16, 24)
    assert decoder.decode(encoder.encode(video)).shape == video.shape
    means = encoder.conv1(encoder.encoder(video.transpose(0, 1)[None]))[0, :16]
    torch.testing.assert_close(decoder.scale(encoder.encode(video).transpose(0, 1)), means)


def test_pixels_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    video = from_uint8(pixels)
    assert video.dtype == torch.float32 and video.shape == (1, 3, 16, 16)
    assert (video.amin(), video.amax()) == (-1, 1)
    assert torch.equal(to_uint8(video), pixels)


def test_published_sizes() -> None:
    """Tensors by name as in `Wan2.1_VAE.pth`, which holds 126.9 million numbers."""
    shapes = vae_encoder_shapes(WAN_VAE)
    with torch.device("meta"):
        assert {
            name: tuple(value.shape) for name, value in VAEEncoder(WAN_VAE).state_dict().items()
        } == shapes
    assert shapes["encoder.conv1.weight"] == (96, 3, 3, 3, 3)
    assert shapes["encoder.downsamples.2.resample.1.weight"] == (96, 96, 3, 3)
    assert "encoder.downsamples.2.time_conv.weight" not in shapes
    assert shapes["encoder.downsamples.3.shortcut.weight"] == (192, 96, 1, 1, 1)
    assert shapes["encoder.downsamples.5.time_conv.weight"] == (192, 192, 3, 1, 1)
    assert shapes["encoder.downsamples.8.time_conv.weight"] == (384, 384, 3, 1, 1)
    assert shapes["encoder.middle.1.to_qkv.weight"] == (1152, 384, 1, 1)
    assert shapes["encoder.head.2.weight"] == (32, 384, 3, 3, 3)
    assert shapes["conv1.weight"] == (32, 32, 1, 1, 1)
    both = [*shapes.values(), *vae_decoder_shapes(WAN_VAE).values()]
    assert round(sum(map(math.prod, both)) / 1e6, 1) == 126.9


def test_encoder_and_decoder_out_of_one_file(tmp_path: Path) -> None:
    encoder, decoder = make_encoder(TINY_VAE, torch.float32), VAEDecoder(TINY_VAE)
    path = tmp_path / "vae.safetensors"
    save_file({**encoder.state_dict(), **decoder.state_dict()}, path)
    loaded = load_vae_encoder_state(path, TINY_VAE)
    assert loaded.keys() == encoder.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in encoder.state_dict().items())
    assert load_vae_state(path, TINY_VAE).keys() == decoder.state_dict().keys()


def test_a_file_without_encoder_is_told_so(tmp_path: Path) -> None:
    save_file(VAEDecoder(TINY_VAE).state_dict(), tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match="a decoder and no encoder"):
        load_vae_encoder_state(tmp_path / "vae.safetensors", TINY_VAE)


@pytest.mark.parametrize("config", [TINY_VAE, LIGHT_VAE, WAN_VAE], ids=["tiny", "light", "wan"])
def test_plans_know_its_parameters_and_caches(config: VAEConfig) -> None:
    from export.request.sizes import encoder_convs, encoder_parameters

    with torch.device("meta"):
        encoder = VAEEncoder(config)
    assert encoder_parameters(config) == sum(value.numel() for value in encoder.parameters())
    shapes = [shape for conv in encoder_convs(config) if (shape := conv.cache_shape(6, 4)) is not None]
    assert shapes == [spec.shape for spec in encoder.cache_specs(6, 4)]
