"""Clips, captions and latents."""

from __future__ import annotations

import numpy as np
import pytest

from training.data.clips import (
    FRAMES,
    KINDS,
    SHAPES,
    SINGLE_KINDS,
    all_clips,
    coverage,
    is_held_out,
    motions,
    random_clip,
)
from training.data.dataset import foreground
from training.data.latents import PatchPCA


def test_captions_are_unique_and_fit_the_text_encoder() -> None:
    captions = [clip.caption for clip in all_clips(KINDS)]
    assert len(set(captions)) == len(captions)
    assert max(len(caption.encode()) for caption in captions) <= 63


def test_the_same_generator_state_gives_the_same_clip() -> None:
    one, other = (random_clip(np.random.default_rng([3, 4]), KINDS) for _ in range(2))
    assert one == other
    assert np.array_equal(one.render(), other.render())


def test_held_out_combinations_are_an_eighth_and_stay_out_of_training() -> None:
    assert len(all_clips(held_out=True)) / len(all_clips()) == pytest.approx(1 / 8)
    generator = np.random.default_rng(0)
    assert not any(is_held_out(random_clip(generator, KINDS)) for _ in range(300))
    assert all(is_held_out(random_clip(generator, KINDS, held_out=True)) for _ in range(30))
    # Every colour, shape and kind is seen in training, only not in every combination.
    seen = all_clips(held_out=False)
    assert {clip.shape for clip in seen} == set(SHAPES)
    assert {(clip.colour, clip.motion.kind) for clip in seen} == {
        (clip.colour, clip.motion.kind) for clip in all_clips()
    }


def test_motions_start_where_they_say_and_stay_in_view() -> None:
    for motion in motions(SINGLE_KINDS):
        path = motion.path()
        x, y, radius = path.T
        assert path.shape == (FRAMES, 3)
        assert (np.minimum(x, y) - radius > 0).all() and (np.maximum(x, y) + radius < 128).all()
        for word, value, is_low in (
            ("left", x, True),
            ("right", x, False),
            ("top", y, True),
            ("bottom", y, False),
        ):
            if word in motion.place.split():
                assert (value[0] < 64) == is_low, motion.phrase
    for motion in motions(["leaves"]):
        x, y, _ = motion.path().T
        assert ((np.minimum(x, y) < -25) | (np.maximum(x, y) > 153)).any(), "out of the picture"
        assert np.allclose(motion.path()[0], motion.path()[-1]), "and back"


def test_clips_show_the_ground_and_the_object() -> None:
    clip = random_clip(np.random.default_rng(1))
    frames = clip.render()
    assert frames.shape == (FRAMES, 128, 128, 3) and frames.dtype == np.uint8
    x, y, _ = clip.path[40].astype(int)
    middle, corner = frames[40, y, x].astype(int), frames[40, 0, 0].astype(int)
    assert np.abs(middle - corner).max() > 60
    assert np.array_equal(clip.render(20, 8), frames[20:28])


def test_shapes_have_about_the_area_of_their_radius() -> None:
    for shape in SHAPES:
        assert 0.5 < coverage(shape, 64, 64, 20).sum() / (np.pi * 400) < 1.1
    with pytest.raises(ValueError, match="expected one of circle"):
        coverage("star", 0, 0, 1)


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    generator = np.random.default_rng(2)
    return [random_clip(generator).render(0, 17) for _ in range(12)]


def test_latents_are_white_and_reconstruct_the_clips(clips: list[np.ndarray]) -> None:
    pca = PatchPCA.fit(clips)
    latents = np.stack([pca.encode(frames) for frames in clips])
    assert latents.shape == (12, 5, 16, 16, 16)
    flat = latents.transpose(0, 1, 3, 4, 2).reshape(-1, 16)
    assert np.allclose(flat.T @ flat / len(flat), np.eye(16), atol=0.02)
    error = np.mean(
        [np.square(pca.decode(z).astype(float) - f).mean() for z, f in zip(latents, clips, strict=True)]
    )
    assert 10 * np.log10(255**2 / error) > 28


def test_the_first_latent_stands_for_one_frame(clips: list[np.ndarray]) -> None:
    pca = PatchPCA.fit(clips[:4])
    still = np.repeat(clips[0][:1], 5, axis=0)
    latents = pca.encode(still)
    assert np.allclose(latents[0], latents[1], atol=1e-4)
    assert pca.decode(latents).shape == still.shape
    with pytest.raises(ValueError, match="multiple of 4"):
        pca.encode(clips[0][:4])


def test_foreground_covers_the_object() -> None:
    clip = random_clip(np.random.default_rng(4))
    frames = clip.render()
    touched = foreground(clip.path[None])[0]
    assert touched.shape == (21, 16, 16) and touched.mean() < 0.35
    differs = (frames != frames[:1, :1, :1]).any(-1)
    for latent in (0, 7, 20):
        pixels = differs[max(0, 4 * latent - 3) : 4 * latent + 1].any(0)
        blocks = pixels.reshape(16, 8, 16, 8).any((1, 3))
        assert not (blocks & ~touched[latent]).any()
