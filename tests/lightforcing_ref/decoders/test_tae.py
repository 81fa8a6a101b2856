"""The tiny decoders: against a queue of frames written from the published description, and streaming against it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from lightforcing_ref.checkpoint import checkpoint_kind, load_vae_state, vae_config_of
from lightforcing_ref.checkpoint.spec import CheckpointKind, tae_decoder_shapes
from lightforcing_ref.decoders.layers import LATENT_MEAN, LATENT_STD
from lightforcing_ref.decoders.tae import LIGHT_TAE, TAE, TINY_TAE, TAEConfig, TAEDecoder, video_decoder
from lightforcing_ref.decoders.vae import VAEDecoder
from lightforcing_ref.dimensions import TINY_VAE
from lightforcing_ref.errors import CheckpointError

TINY_LIGHT_TAE = TAEConfig(widths=TINY_TAE.widths, denormalise=True)
CONFIGS = pytest.mark.parametrize("config", [TINY_TAE, TINY_LIGHT_TAE], ids=["taehv", "light"])

GROWS = {7: 1, 13: 2, 19: 2}
MEMORIES = (3, 4, 5, 9, 10, 11, 15, 16, 17)


def make_decoder(config: TAEConfig, dtype: torch.dtype = torch.float64) -> TAEDecoder:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return TAEDecoder(config).to(dtype).eval().requires_grad_(False)


def make_latents(frames: int, height: int = 3, width: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(frames, 16, height, width, dtype=torch.float64, generator=generator)


class FrameByFrame:
    """The published decoder, one frame at a time through one layer at a time, from its state dict alone."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state
        self.past: dict[int, Tensor] = {}

    def conv(self, key: str, x: Tensor) -> Tensor:
        weight = self.state[f"{key}.weight"]
        return F.conv2d(x, weight, self.state.get(f"{key}.bias"), padding=weight.shape[-1] // 2)

    def memory(self, index: int, x: Tensor) -> Tensor:
        seen = torch.cat([x, self.past.get(index, x * 0)])
        self.past[index] = x
        for part in (0, 2):
            seen = self.conv(f"decoder.{index}.conv.{part}", seen).relu()
        return (self.conv(f"decoder.{index}.conv.4", seen) + x).relu()

    def frames(self, index: int, x: Tensor) -> Iterator[Tensor]:
        """All pixel frames that come out of layer `index` onwards."""
        if index == 23:
            yield x
        elif index in GROWS:
            for part in self.conv(f"decoder.{index}.conv", x).chunk(GROWS[index]):
                yield from self.frames(index + 1, part)
        elif index in MEMORIES:
            yield from self.frames(index + 1, self.memory(index, x))
        elif index in (6, 12, 18):
            yield from self.frames(index + 1, x.repeat_interleave(2, 1).repeat_interleave(2, 2))
        elif index in (2, 21):
            yield from self.frames(index + 1, x.relu())
        elif index == 0:
            yield from self.frames(1, 3 * torch.tanh(x / 3))
        else:
            yield from self.frames(index + 1, self.conv(f"decoder.{index}", x))

    def decode(self, latents: Tensor) -> Tensor:
        return torch.stack([frame for latent in latents for frame in self.frames(0, latent)])[3:] * 2 - 1


@CONFIGS
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_decoder_computes_what_is_published(config: TAEConfig, frames: int) -> None:
    decoder, latents = make_decoder(config), make_latents(frames)
    given = latents
    if config.denormalise:
        mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (LATENT_MEAN, LATENT_STD))
        given = latents * std + mean
    expected = FrameByFrame(decoder.state_dict()).decode(given)
    assert expected.shape == (4 * frames - 3, 3, 24, 16)
    torch.testing.assert_close(decoder.decode(latents), expected, rtol=0, atol=1e-12)


@CONFIGS
@pytest.mark.parametrize("steps", [[1] * 5, [3, 2], [2, 1, 2]], ids=str)
def test_streaming_equals_the_whole_clip(config: TAEConfig, steps: list[int]) -> None:
    decoder, latents = make_decoder(config), make_latents(1 + sum(steps))
    video, caches = decoder.decode_first(latents[:1].transpose(0, 1))
    videos, start = [video], 1
    for step in steps:
        kept = [cache.clone() for cache in caches]
        video, following = decoder.decode_next(latents[start : start + step].transpose(0, 1), caches)
        assert all(torch.equal(*pair) for pair in zip(kept, caches, strict=True)), (
            "the caller's caches changed"
        )
        videos.append(video)
        caches, start = following, start + step
    torch.testing.assert_close(torch.cat(videos), decoder.decode(latents), rtol=0, atol=1e-12)


def test_caches_are_as_specified() -> None:
    decoder = make_decoder(TINY_TAE)
    _, caches = decoder.decode_first(make_latents(1).transpose(0, 1))
    specs = decoder.cache_specs(3, 2)
    assert [tuple(cache.shape) for cache in caches] == [spec.shape for spec in specs]
    assert [spec.name for spec in specs] == [f"cache.{i}" for i in range(9)]
    assert all(spec.written_by_first for spec in specs)


def test_caches_at_full_size() -> None:
    """256 x 60 x 104 and 128, 64 channels at twice and four times that, three of each."""
    with torch.device("meta"):
        specs = TAEDecoder(TAE).cache_specs(60, 104)
    sizes = [torch.Size(spec.shape).numel() for spec in specs]
    assert sum(sizes) == 3 * 60 * 104 * (256 + 4 * 128 + 16 * 64)


# ---- checkpoints ----


@pytest.mark.parametrize("config", [TAE, LIGHT_TAE, TINY_TAE], ids=["taehv", "light", "tiny"])
def test_key_list_is_that_of_the_model(config: TAEConfig) -> None:
    with torch.device("meta"):
        model = video_decoder(config)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == tae_decoder_shapes(
        config
    )


def test_key_list_is_the_published_one() -> None:
    """64 of the file's 128 tensors are the decoder's; with the encoder's 1.37 million it has 11.3 million elements."""
    shapes = tae_decoder_shapes(TAE)
    assert len(shapes) == 64
    assert shapes["decoder.1.weight"] == (256, 16, 3, 3)
    assert shapes["decoder.3.conv.0.weight"] == (256, 512, 3, 3)
    assert shapes["decoder.7.conv.weight"] == (256, 256, 1, 1)
    assert shapes["decoder.13.conv.weight"] == (256, 128, 1, 1)
    assert shapes["decoder.19.conv.weight"] == (128, 64, 1, 1)
    assert shapes["decoder.22.weight"] == (3, 64, 3, 3)
    assert "decoder.8.bias" not in shapes
    elements = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert round(elements / 1e6, 1) == 9.8
    # What is left for the encoder is nine blocks of 64 channels and the convolutions between them.
    block = 9 * (2 * 64 + 64 + 64) * 64 + 3 * 64
    outer = 3 * 9 * 64 + 64 + 2 * (128 * 64) + 64 * 64 + 3 * 9 * 64 * 64 + 9 * 64 * 16 + 16
    assert round((elements + 9 * block + outer) / 1e6, 1) == 11.3


def write(folder: Path, name: str, config: TAEConfig) -> Path:
    state = {**make_decoder(config, torch.float16).state_dict(), "encoder.0.weight": torch.zeros(4, 3, 3, 3)}
    save_file(state, folder / name)
    return folder / name


def test_a_file_is_recognised(tmp_path: Path) -> None:
    path = write(tmp_path, "taew2_1.safetensors", TINY_TAE)
    assert checkpoint_kind(path) == CheckpointKind.TAE
    assert vae_config_of(path) == TINY_TAE
    loaded = load_vae_state(path, TINY_TAE, dtype=torch.float32)
    expected = make_decoder(TINY_TAE, torch.float16).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(value, expected[key].float()) for key, value in loaded.items())


def test_light_tae_is_known_by_its_name(tmp_path: Path) -> None:
    assert vae_config_of(write(tmp_path, "lighttaew2_1.safetensors", TINY_TAE)) == TINY_LIGHT_TAE


def test_another_latent_space_is_refused(tmp_path: Path) -> None:
    """Wan 2.2's has 48 channels."""
    path = write(tmp_path, "taew2_2.safetensors", TAEConfig(widths=TINY_TAE.widths, z_dim=48))
    with pytest.raises(
        CheckpointError, match=r"decoder\.1\.weight is \[16, 48, 3, 3\], expected \[16, 16, 3, 3\]"
    ):
        vae_config_of(path)


def test_each_decoder_is_made() -> None:
    with torch.device("meta"):
        assert isinstance(video_decoder(TINY_VAE), VAEDecoder)
        assert isinstance(video_decoder(TINY_TAE), TAEDecoder)
