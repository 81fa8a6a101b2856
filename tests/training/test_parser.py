"""The parser of frames, on ground truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from benchmarks.quality.parser import observe, read
from benchmarks.quality.scores import psnr, score, ssim, summarise
from training.data.clips import KINDS, random_clip


@pytest.mark.parametrize(("blur", "noise"), [(0.0, 0.0), (1.0, 8.0)])
def test_parser_reads_clips_back(blur: float, noise: float) -> None:
    generator = np.random.default_rng(5)
    for index in range(len(KINDS)):
        clip = random_clip(generator, [KINDS[index]])
        frames = clip.render().astype(np.float64)
        frames = gaussian_filter(frames, (0, blur, blur, 0)) + generator.normal(0, noise, frames.shape)
        found = read(np.clip(frames, 0, 255).astype(np.uint8))
        assert (found.ground, found.colour, found.shape, found.motion) == (
            clip.ground,
            clip.colour,
            clip.shape,
            clip.motion,
        ), clip.caption


@pytest.mark.slow
def test_parser_reads_99_of_100_clips() -> None:
    generator = np.random.default_rng(6)
    clips = [random_clip(generator, KINDS) for _ in range(400)]
    right = [
        (found.colour, found.shape, found.motion) == (clip.colour, clip.shape, clip.motion)
        for clip in clips
        for found in [read(clip.render())]
    ]
    assert np.mean(right) >= 0.99


def test_an_empty_frame_has_no_object() -> None:
    frame = np.full((128, 128, 3), 122, np.uint8)
    found = observe(frame)
    assert found.ground == "grey" and found.colour is None
    assert read(np.repeat(frame[None], 81, 0)).motion is None


def test_noise_is_no_shape() -> None:
    generator = np.random.default_rng(1)
    noise = gaussian_filter(generator.normal(122, 60, (17, 128, 128, 3)), (0, 3, 3, 0))
    frames = np.clip(122 + 6 * (noise - 122), 0, 255).astype(np.uint8)
    found = read(frames)
    assert found.shape is None and found.motion is None and found.steady == 0


def test_scores_tell_right_from_wrong() -> None:
    clip = random_clip(np.random.default_rng(8), ["moves"], jitter=0)
    frames = clip.render()
    right = score(frames, clip, 0, frames)
    assert (
        right.colour and right.shape and right.motion and right.psnr == 99 and right.ssim == pytest.approx(1)
    )
    assert len(right.by_chunk) == 7 and all(right.by_chunk) and right.path_error is not None
    assert right.path_error < 1
    wrong = score(frames[::-1], replace(clip, colour="red" if clip.colour != "red" else "blue"), 0, frames)
    assert not wrong.colour and not wrong.motion and wrong.shape
    summary = summarise([right, wrong])
    assert summary["colour"] == 0.5 and summary["shape"] == 1 and summary["reappears"] is None


def test_a_clip_that_loses_its_object_does_not_reappear() -> None:
    clip = random_clip(np.random.default_rng(9), ["leaves"], jitter=0)
    frames = clip.render()
    assert score(frames, clip, 0).reappears
    lost = frames.copy()
    lost[40:] = frames[40]
    assert score(lost, clip, 0).reappears is False


def test_psnr_and_ssim_fall_with_noise() -> None:
    generator = np.random.default_rng(0)
    frames = random_clip(generator).render(0, 9)
    noisy = np.clip(frames + generator.normal(0, 10, frames.shape), 0, 255).astype(np.uint8)
    assert psnr(frames, noisy) == pytest.approx(28.1, abs=1.0)
    assert ssim(frames, noisy) < 0.9
