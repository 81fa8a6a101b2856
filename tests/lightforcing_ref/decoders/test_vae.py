"""The video decoder: against the published description written out, and streaming against the whole clip."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightforcing_ref.decoders.vae import VAEDecoder, to_uint8
from lightforcing_ref.dimensions import LIGHT_VAE, TINY_VAE, WAN_VAE, VAEConfig
from tests.lightforcing_ref.decoders.published import Published

SHALLOW = VAEConfig(dim=4, dim_mult=(1, 2), num_res_blocks=0, temporal_upsample=(True,))
"""Every kind of layer once, for tests that pay by the layer."""


def make_decoder(config: VAEConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> VAEDecoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = VAEDecoder(config)
        for name, parameter in decoder.named_parameters():
            if name.endswith("gamma"):
                nn.init.uniform_(parameter, 0.5, 1.5)
    return decoder.to(dtype).eval().requires_grad_(False)


def make_latents(frames: int, height: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(frames, 16, height, width, generator=generator, dtype=torch.float64).to(dtype)


def stream(decoder: VAEDecoder, latents: Tensor, steps: list[int] | None = None) -> Tensor:
    """Decode the first frame, then the others in runs of `steps` frames, one by one by default."""
    video, caches = decoder.decode_first(latents[:1].transpose(0, 1))
    videos = [video]
    for part in latents[1:].split(steps or 1) if len(latents) > 1 else ():
        video, caches = decoder.decode_next(part.transpose(0, 1), caches)
        videos.append(video)
    return torch.cat(videos)


@pytest.mark.parametrize("config", [TINY_VAE, LIGHT_VAE], ids=["tiny", "light"])
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_decoder_computes_what_is_published(config: VAEConfig, frames: int) -> None:
    decoder, latents = make_decoder(config), make_latents(frames, 2, 3)
    expected = Published(decoder.state_dict()).decode(latents)
    assert expected.shape == (1 + 4 * (frames - 1), 3, 16, 24)
    torch.testing.assert_close(decoder.decode(latents), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(stream(decoder, latents), expected, rtol=0, atol=1e-12)


# ---- streaming ----


@pytest.mark.parametrize(
    ("config", "height", "width", "frames"),
    [(TINY_VAE, 3, 4, 6), (LIGHT_VAE, 2, 3, 4), (WAN_VAE, 1, 2, 3)],
    ids=["tiny", "light", "wan"],
)
def test_streaming_equals_the_whole_clip(config: VAEConfig, height: int, width: int, frames: int) -> None:
    """Exact in float64. In float32 convolutions over other extents may add up in another order, so only nearly."""
    decoder, latents = make_decoder(config), make_latents(frames, height, width)
    torch.testing.assert_close(stream(decoder, latents), decoder.decode(latents), rtol=0, atol=1e-12)
    decoder, latents = decoder.float(), latents.float()
    torch.testing.assert_close(stream(decoder, latents), decoder.decode(latents), rtol=0, atol=2e-5)


@settings(max_examples=12, deadline=None)
@given(
    steps=st.lists(st.integers(1, 3), max_size=3),
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    temporal=st.sampled_from([(True, True), (True, False), (False, True), (False, False)]),
)
def test_streaming_in_runs_of_any_length(
    steps: list[int], height: int, width: int, temporal: tuple[bool, bool]
) -> None:
    config = VAEConfig(dim=4, dim_mult=(1, 1, 2), num_res_blocks=0, temporal_upsample=temporal)
    decoder, latents = make_decoder(config), make_latents(1 + sum(steps), height, width)
    whole = decoder.decode(latents)
    assert whole.shape == (1 + config.temporal_factor * sum(steps), 3, 4 * height, 4 * width)
    torch.testing.assert_close(stream(decoder, latents, steps), whole, rtol=0, atol=1e-12)


def test_later_frames_do_not_change_earlier_ones() -> None:
    decoder, latents = make_decoder(TINY_VAE), make_latents(5, 2, 2)
    other = latents.clone()
    other[3:] += 1
    before, after = decoder.decode(latents), decoder.decode(other)
    torch.testing.assert_close(before[:9], after[:9], rtol=0, atol=1e-12)
    assert (before[9:13] - after[9:13]).abs().amax() > 1e-3


def test_streaming_is_a_pure_function_of_its_tensors() -> None:
    decoder, latents = make_decoder(TINY_VAE), make_latents(3, 2, 2)
    frames = [latents[i : i + 1].transpose(0, 1) for i in range(3)]
    _, caches = decoder.decode_first(frames[0])
    copies = [cache.clone() for cache in caches]
    video, new = decoder.decode_next(frames[1], caches)
    decoder.decode_next(frames[2], new)
    for cache, copy in zip(caches, copies, strict=True):
        assert torch.equal(cache, copy)
    again, new_again = decoder.decode_next(frames[1], copies)
    assert torch.equal(video, again)
    for cache, other in zip(new, new_again, strict=True):
        assert torch.equal(cache, other)


# ---- caches ----


def test_caches_at_480x832() -> None:
    with torch.device("meta"):
        wan, light = (VAEDecoder(config).cache_specs(60, 104) for config in (WAN_VAE, LIGHT_VAE))
    assert [spec.name for spec in wan] == [f"cache.{i}" for i in range(32)]
    assert sum(math.prod(spec.shape) for spec in wan) == 944_286_720
    for full, narrow in zip(wan[1:], light[1:], strict=True):
        assert narrow.shape == (1, full.shape[1] // 4, *full.shape[2:])
    assert wan[0].shape == light[0].shape == (1, 16, 2, 60, 104)


@pytest.mark.parametrize("config", [TINY_VAE, SHALLOW], ids=["tiny", "shallow"])
def test_caches_are_as_specified(config: VAEConfig) -> None:
    decoder, latents = make_decoder(config), make_latents(2, 3, 2)
    specs = decoder.cache_specs(3, 2)
    _, first = decoder.decode_first(latents[:1].transpose(0, 1))
    _, later = decoder.decode_next(latents[1:].transpose(0, 1), first)
    assert [tuple(cache.shape) for cache in first] == [spec.shape for spec in specs]
    assert [tuple(cache.shape) for cache in later] == [spec.shape for spec in specs]
    for spec, cache, next_cache in zip(specs, first, later, strict=True):
        assert not cache[:, :, 0].any(), "nothing came before the first frame"
        assert cache[:, :, 1].any() == spec.written_by_first
        assert next_cache.any()
    unwritten = [spec.name for spec in specs if not spec.written_by_first]
    assert len(unwritten) == sum(config.temporal_upsample)
    if config == TINY_VAE:
        assert unwritten == ["cache.11", "cache.18"]


def test_shapes_at_full_size() -> None:
    with torch.device("meta"):
        decoder = VAEDecoder(WAN_VAE)
        latent = torch.empty(16, 1, 60, 104)
        assert decoder.decode(torch.empty(21, 16, 60, 104)).shape == (81, 3, 480, 832)
        video, caches = decoder.decode_first(latent)
        assert video.shape == (1, 3, 480, 832)
        video, caches = decoder.decode_next(latent, caches)
        assert video.shape == (4, 3, 480, 832)
    assert [tuple(cache.shape) for cache in caches] == [spec.shape for spec in decoder.cache_specs(60, 104)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_follows_float32(dtype: torch.dtype) -> None:
    decoder, latents = make_decoder(TINY_VAE, torch.float32), make_latents(3, 2, 2, torch.float32)
    exact = decoder.decode(latents)
    half = stream(decoder.to(dtype), latents.to(dtype))
    assert half.dtype == dtype
    assert (half.float() - exact).norm() / exact.norm() < 0.05


# ---- pixels and export ----


@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=16))
def test_pixels(values: list[float]) -> None:
    video = np.array(values, dtype=np.float32).reshape(1, 1, 1, -1).repeat(3, axis=1)
    expected = np.rint(np.clip((video + np.float32(1)) * np.float32(127.5), 0, 255)).astype(np.uint8)
    pixels = to_uint8(torch.from_numpy(video))
    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels.numpy(), expected.transpose(0, 2, 3, 1))


def test_pixels_at_the_ends() -> None:
    video = torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0]).reshape(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_uint8(video)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


class FirstFrame(nn.Module):
    def __init__(self, decoder: VAEDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        video, caches = self.decoder.decode_first(latent)
        return video, to_uint8(video), caches


class LaterFrame(nn.Module):
    def __init__(self, decoder: VAEDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, latent: Tensor, caches: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        video, caches = self.decoder.decode_next(latent, caches)
        return video, to_uint8(video), caches


@pytest.mark.parametrize(
    "config", [SHALLOW, pytest.param(TINY_VAE, marks=pytest.mark.slow)], ids=["shallow", "tiny"]
)
def test_both_graphs_export_and_stream_in_onnxruntime(config: VAEConfig, tmp_path: Path) -> None:
    import onnxruntime

    decoder, latents = make_decoder(config, torch.float32), make_latents(4, 3, 2, torch.float32)
    frames = [latents[i : i + 1].transpose(0, 1).contiguous() for i in range(4)]
    caches = [torch.zeros(spec.shape) for spec in decoder.cache_specs(3, 2)]
    sessions = []
    for module, inputs in ((FirstFrame(decoder), (frames[0],)), (LaterFrame(decoder), (frames[0], caches))):
        program = torch.onnx.export(module.eval(), inputs, dynamo=True, opset_version=23, verbose=False)
        assert program is not None
        path = tmp_path / f"{type(module).__name__}.onnx"
        program.save(path)
        sessions.append(onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]))
    first, later = sessions
    video, pixels, *state = first.run(None, {first.get_inputs()[0].name: frames[0].numpy()})
    videos, images = [video], [pixels]
    names = [value.name for value in later.get_inputs()]
    for frame in frames[1:]:
        video, pixels, *state = later.run(None, dict(zip(names, [frame.numpy(), *state], strict=True)))
        videos.append(video)
        images.append(pixels)
    expected = decoder.decode(latents)
    video = torch.from_numpy(np.concatenate(videos))
    torch.testing.assert_close(video, expected, rtol=0, atol=5e-5)
    assert np.array_equal(np.concatenate(images), to_uint8(video).numpy())
