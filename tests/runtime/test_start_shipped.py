"""The shipped tiny model goes on from an image and from a clip: its encoder was derived for just that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from export.compare.result import psnr
from export.request.weights import Weights, shipped_weights
from lightforcing_ref.config import PRESETS
from lightforcing_ref.decoders.vae import to_uint8
from lightforcing_ref.decoders.vae_encoder import from_uint8
from runtime import Pipeline
from tests.conftest import build, shared
from tests.runtime.naive import NaiveRollout
from training.data.clips import Clip, random_clip

pytestmark = pytest.mark.slow

GIVEN = 33
"""Three chunks: nine frames and twice twelve."""
ROUNDING_DB = 0.05
"""By which a bundle's float32 may be behind PyTorch's."""
CLEARLY_DB = 6.0
"""Half the error."""


@pytest.fixture(scope="module")
def weights() -> Weights:
    found = shipped_weights(PRESETS["tiny"], dense=True)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def bundle(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `build --preset tiny --variant dense --with-encoder` makes it."""
    return shared(
        tmp_path_factory,
        "tiny-shipped-encoder",
        lambda out: build(out, "dense", weights=weights, with_encoder=True),
    )


@pytest.fixture(scope="module")
def clip() -> Clip:
    return random_clip(np.random.default_rng(5), ["moves"], jitter=0.0)


def decibels(found: np.ndarray, expected: np.ndarray) -> float:
    signal = psnr(found, expected)
    assert signal is not None
    return signal


def through_the_oracle(weights: Weights, frames: np.ndarray) -> np.ndarray:
    """Frames uint8 `[N, H, W, 3]`, encoded and decoded by PyTorch, whole clips at once."""
    latents = weights.vae_encoder().encode(from_uint8(torch.from_numpy(frames)))
    return np.asarray(to_uint8(weights.vae_decoder().decode(latents)).numpy())


@pytest.mark.parametrize("frames", [1, GIVEN], ids=["image", "clip"])
def test_given_frames_are_read_back(bundle: Path, weights: Weights, clip: Clip, frames: int) -> None:
    """As close to the given ones as the oracle's encoder and decoder bring them; the session went on from just that."""
    start = clip.render(0, frames)
    whole = start if frames > 1 else start.repeat(9, axis=0)  # an image is a still of one chunk
    with (
        Pipeline.load(bundle, threads=1) as pipe,
        pipe.session(clip.caption, seed=3, start=start) as session,
    ):
        embedding = pipe.embed(clip.caption)
        found = next(session.stream(chunks=1)).frames
    plain = NaiveRollout(bundle, embedding, 3)
    read = plain.give(whole)
    assert np.array_equal(found, plain.next_chunk())
    expected = decibels(through_the_oracle(weights, whole), whole)
    assert decibels(read, whole) > expected - ROUNDING_DB


def test_a_clip_goes_on_where_it_ended(bundle: Path, clip: Clip) -> None:
    """Its beginning is left out, so that where things are next follows from the given frames, not from the caption."""
    shown = clip.render(12, GIVEN + 12)
    start, expected = shown[:GIVEN], shown[GIVEN:]
    with (
        Pipeline.load(bundle, threads=1) as pipe,
        pipe.session(clip.caption, seed=3, start=start) as session,
    ):
        found = next(session.stream(chunks=1)).frames
    reached = decibels(found, expected)
    assert reached > decibels(start[-1:].repeat(12, axis=0), expected) + CLEARLY_DB, "it stands still"
    assert reached > decibels(found, clip.render(GIVEN, 12)) + CLEARLY_DB, (
        "it is where the caption alone has it"
    )
