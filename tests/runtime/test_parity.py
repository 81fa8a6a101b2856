"""Noise of the caller's own and latents out: what a comparison with another implementation needs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from export.compare.reference import Reference
from runtime import CapacityError, InputError, Pipeline, SessionFailedError
from runtime.bundle import load_bundle
from runtime.cli.main import main
from tests.runtime.naive import NaiveRollout

CHUNKS = 3


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(bundle, threads=1) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def naive(bundle: Path, pipe: Pipeline) -> NaiveRollout:
    """The plain rollout of seed 5, played for as many chunks as the tests look at."""
    rollout = NaiveRollout(bundle, pipe.embed("a fox"), seed=5)
    for _ in range(CHUNKS):
        rollout.next_chunk()
    return rollout


@pytest.fixture(scope="module")
def noise(naive: NaiveRollout) -> np.ndarray:
    """What seed 5 draws, `[chunks, steps, channels, frames, h, w]`."""
    return np.stack([[naive.noise(chunk, step) for step in range(4)] for chunk in range(CHUNKS)])


@pytest.mark.parametrize("form", ["array", "function", "float64", "list"])
def test_noise_of_ones_own_is_what_the_seed_would_draw(
    pipe: Pipeline, naive: NaiveRollout, noise: np.ndarray, form: str
) -> None:
    given = {
        "array": noise,
        "function": naive.noise,
        "float64": noise.astype(np.float64),
        "list": noise.tolist(),
    }[form]
    with pipe.session("a fox", seed=5) as session:
        expected = [chunk.frames for chunk in session.stream(chunks=CHUNKS)]
    with pipe.session("a fox", noise=given, latents=True) as session:
        chunks = list(session.stream(chunks=CHUNKS))
    for index, (chunk, frames) in enumerate(zip(chunks, expected, strict=True)):
        np.testing.assert_array_equal(chunk.frames, frames)
        assert chunk.latent is not None and chunk.latent.dtype == np.float32
        np.testing.assert_array_equal(chunk.latent, naive.latents[index])


def test_latents_are_kept_only_where_asked_for_and_belong_to_the_caller(pipe: Pipeline) -> None:
    with pipe.session("a fox") as session:
        assert next(session.stream()).latent is None
    with pipe.session("a fox", latents=True) as session:
        stream = session.stream(chunks=2)
        first = next(stream)
        assert first.latent is not None
        kept = first.latent.copy()
        next(stream)
        np.testing.assert_array_equal(first.latent, kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda noise: noise[0], r"noise has shape .* expected \[chunks, 4, "),
        (lambda noise: noise[:0], "noise has shape"),
        (lambda noise: noise[..., :-1], "noise has shape"),
        (lambda noise: 7, "noise has shape"),
    ],
)
def test_noise_of_another_shape_is_refused_and_takes_no_place(
    pipe: Pipeline, noise: np.ndarray, change: object, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        pipe.session("a fox", noise=change(noise))  # type: ignore[operator]
    assert pipe.health().open == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda noise: noise[:1],
            "chunk 1 failed: chunk 1 needs noise, and the noise given is that of 1 chunks",
        ),
        (lambda noise: np.where(np.arange(3).reshape(3, 1, 1, 1, 1, 1) == 1, np.nan, noise), "not finite"),
        (
            lambda noise: lambda chunk, step: noise[chunk, step, :1] if chunk else noise[0, step],
            "expected floating",
        ),
        (lambda noise: noise.astype("c8"), "complex64"),
    ],
)
def test_noise_that_does_not_do_ends_the_session_at_its_chunk(
    pipe: Pipeline, noise: np.ndarray, make: object, message: str
) -> None:
    with (
        pipe.session("a fox", noise=make(noise)) as session,
        pytest.raises(SessionFailedError, match=message),
    ):  # type: ignore[operator]
        list(session.stream(chunks=CHUNKS))


def test_a_session_with_noise_of_its_own_is_not_saved(
    pipe: Pipeline, noise: np.ndarray, tmp_path: Path
) -> None:
    with pipe.session("a fox", noise=noise) as session:
        next(session.stream())
        with pytest.raises(InputError, match="only sessions with a seed are saved"):
            session.save(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_a_session_without_a_place_is_refused_before_its_prompt_is_encoded(pipe: Pipeline) -> None:
    with pipe.session("a fox"):
        encoder = pipe._text_encoder
        assert encoder is not None
        before = set(encoder._embeddings)
        with pytest.raises(CapacityError):
            pipe.session("a prompt that was never seen")
        assert set(encoder._embeddings) == before
    with pytest.raises(InputError):
        pipe.session(7)  # type: ignore[arg-type]
    with pipe.session("a fox"):
        pass


def test_a_chunk_is_shown_without_its_pixels(pipe: Pipeline) -> None:
    with pipe.session("a fox", label="x", latents=True) as session:
        text = repr(next(session.stream()))
    assert text.startswith("<Chunk 0: frames [9, 32, 32, 3], latent [") and "'x'" in text and len(text) < 120


def test_from_files_to_files(
    bundle: Path, naive: NaiveRollout, noise: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "noise.npy", noise)
    command = [
        "generate",
        str(bundle),
        "--prompt",
        "a fox",
        "--threads",
        "1",
        "--out",
        str(tmp_path / "a.mp4"),
    ]
    files = ["--noise-file", str(tmp_path / "noise.npy"), "--latents", str(tmp_path / "latents.npy")]
    assert main([*command, *files, "--seconds", "2"]) == 0
    expected = np.concatenate([naive.latents[chunk] for chunk in range(3)], axis=1)
    np.testing.assert_array_equal(np.load(tmp_path / "latents.npy"), expected)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main([*command[:-1], str(tmp_path / "b.mp4"), *files[:2], "--seconds", "5"]) == 2
    assert "holds the noise of 3 chunks, and 5 s are 7" in capsys.readouterr().err
    np.savez(tmp_path / "several.npz", a=noise)
    assert main([*command, "--noise-file", str(tmp_path / "several.npz")]) == 2
    assert "several arrays" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "several.npz"])


def test_against_the_model_in_pytorch_from_the_same_noise(tiny_bundle: Path) -> None:
    manifest = load_bundle(tiny_bundle).manifest
    reference = Reference.of(manifest)
    model = manifest.model
    shape = (model.latent_channels, model.chunk_frames, model.latent_height, model.latent_width)
    drawn = torch.randn((2, 4, *shape), generator=torch.Generator().manual_seed(11))
    with Pipeline.load(tiny_bundle, threads=1, warmup=False) as pipeline:
        embedding = pipeline.embed("a fox")
        with pipeline.session(embedding=embedding, noise=drawn.numpy(), latents=True) as session:
            found = np.concatenate(
                [chunk.latent for chunk in session.stream(chunks=2) if chunk.latent is not None], 1
            )
    rollout = reference.rollout(manifest, torch.from_numpy(embedding), seed=0)
    rollout.noise = lambda chunk, step: drawn[chunk, step]
    expected = torch.cat(list(rollout.stream(2)), dim=1).numpy()
    gc.collect()
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)
