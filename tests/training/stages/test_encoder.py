"""The derived video encoder gives the latents that the transformer was trained on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightforcing_ref.decoders.vae_encoder import VAEEncoder, from_uint8
from lightforcing_ref.dimensions import TINY_VAE
from training.data.clips import random_clip
from training.data.latents import PatchPCA
from training.stages.encoder import derive_encoder


@pytest.fixture(scope="module")
def pca() -> PatchPCA:
    generator = np.random.default_rng(1)
    return PatchPCA.fit(random_clip(generator).render(4 * index, 9) for index in range(8))


@pytest.fixture(scope="module")
def encoder(pca: PatchPCA) -> VAEEncoder:
    generator = np.random.default_rng(2)
    return derive_encoder(pca, (random_clip(generator).render(8 * index, 9) for index in range(8)), TINY_VAE)


def test_the_encoder_computes_the_pca_of_other_clips(pca: PatchPCA, encoder: VAEEncoder) -> None:
    frames = random_clip(np.random.default_rng(3)).render(30, 9)
    expected = pca.encode(frames)
    with torch.no_grad():
        found = encoder.encode(from_uint8(torch.from_numpy(frames))).numpy()
    errors = np.square(found - expected).mean((1, 2, 3)) / np.square(expected).mean((1, 2, 3))
    assert (errors < 0.01).all(), errors


def test_a_clip_at_rest_has_one_latent(pca: PatchPCA, encoder: VAEEncoder) -> None:
    """The first frame passes the temporal convolutions by; what they make of frames at rest is the same."""
    frames = np.repeat(random_clip(np.random.default_rng(4)).render(0, 1), 9, axis=0)
    with torch.no_grad():
        first, second, third = encoder.encode(from_uint8(torch.from_numpy(frames)))
    torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(third, first, rtol=1e-3, atol=1e-3)


def test_there_is_no_encoder_without_clips(pca: PatchPCA) -> None:
    with pytest.raises(ValueError, match="no clips"):
        derive_encoder(pca, [], TINY_VAE)
