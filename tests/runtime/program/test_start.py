"""Rollouts that start from frames: against the plain way, on the host and on a simulated GPU, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from runtime import pipeline as pipeline_module
from runtime.backends import load_engine
from runtime.bundle import load_bundle
from runtime.errors import BundleError, InputError
from runtime.pipeline import Pipeline
from runtime.verify.dry_run import dry_run
from tests.runtime.conftest import MakeBundle
from tests.runtime.handmade import PIXELS, edit_manifest
from tests.runtime.naive import NaiveRollout
from tests.runtime.program.test_program_engine import Load, OnGpu, embedding


@pytest.fixture(scope="module")
def path(make_bundle: MakeBundle) -> Path:
    """Past of five frames: a rollout starts from one chunk at most."""
    return make_bundle(with_encoder=True)


@pytest.fixture(scope="module")
def wide(make_bundle: MakeBundle) -> Path:
    """Past of 18 frames: a rollout starts from up to six chunks."""
    return make_bundle(with_encoder=True, window_frames=None)


def clip(frames: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (frames, PIXELS, PIXELS, 3)).astype(np.uint8)


def plain(path: Path, start: np.ndarray, seed: int, chunks: int) -> np.ndarray:
    naive = NaiveRollout(path, embedding(path, 0), seed)
    naive.give(start)
    return np.concatenate([naive.next_chunk() for _ in range(chunks)])


@pytest.mark.parametrize(
    "load", [lambda: load_engine, lambda: OnGpu(0, 0.0), lambda: OnGpu(1, 0.4)], ids=["host", "late", "gpu"]
)
def test_sessions_that_start_from_clips_in_turns(
    wide: Path, load: Callable[[], Load], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one encoder made for a session is not touched by the other's."""
    monkeypatch.setattr(pipeline_module, "load_engine", load())
    starts = [clip(21, seed=1), clip(33, seed=2)]
    with Pipeline.load(wide, sessions=2, threads=1) as pipe:
        opened = [
            pipe.session(embedding=embedding(wide, 0), seed=number, start=start)
            for number, start in enumerate(starts)
        ]
        found: list[list[np.ndarray]] = [[], []]
        streams = [session.stream(chunks=4) for session in opened]
        for _ in range(4):
            for frames, stream in zip(found, streams, strict=True):
                frames.append(next(stream).frames)
    for number, start in enumerate(starts):
        assert np.array_equal(np.concatenate(found[number]), plain(wide, start, number, 4))
    assert not np.array_equal(found[0][0], plain(wide, starts[1], 0, 1))


def test_an_image_is_a_still_of_one_chunk(path: Path) -> None:
    image = clip(1)[0]
    with Pipeline.load(path, threads=1) as pipe, pipe.session("a", seed=3, start=image) as session:
        chunk = next(session.stream(chunks=1))
        embedded = pipe.embed("a")
        statistics = session.statistics
    naive = NaiveRollout(path, embedded, 3)
    naive.give(np.repeat(image[None], 9, axis=0))
    assert np.array_equal(chunk.frames, naive.next_chunk())
    assert (chunk.index, session.first_frame(chunk.index)) == (1, 9)
    assert (statistics.delivered, statistics.chunks) == (1, 2)


@pytest.mark.parametrize(("frames", "used"), [(2, 9), (9, 9), (20, 9), (21, 21), (34, 33), (200, 69)])
def test_the_last_frames_count_in_whole_chunks_as_far_as_attention_looks_back(
    wide: Path, frames: int, used: int
) -> None:
    """Nine frames are a first chunk, twelve each later one, six chunks the past of 18 latent frames."""
    start = clip(frames)
    taken = start[-used:] if frames >= used else np.concatenate([start[:1]] * (used - frames) + [start])
    with Pipeline.load(wide, threads=1) as pipe:
        with pipe.session("a", start=start) as session:
            chunk = next(session.stream(chunks=1))
        assert chunk.index == 1 + (used - 9) // 12
        with pipe.session("a", start=taken) as session:
            assert np.array_equal(next(session.stream(chunks=1)).frames, chunk.frames)


def test_prompts_switch_behind_the_start_as_everywhere(wide: Path) -> None:
    naive = NaiveRollout(wide, embedding(wide, 0), 5)
    naive.give(clip(21))
    expected = [naive.next_chunk()]
    naive.set_prompt(embedding(wide, 1), "window")
    expected.append(naive.next_chunk())
    first = embedding(wide, 0)
    with (
        Pipeline.load(wide, threads=1) as pipe,
        pipe.session(embedding=first, seed=5, start=clip(21)) as session,
    ):
        session.set_prompt(embedding=embedding(wide, 1), at=3)
        found = [chunk.frames for chunk in session.stream(chunks=2)]
    assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))


def test_seconds_are_those_of_new_video(wide: Path) -> None:
    with Pipeline.load(wide, threads=1) as pipe, pipe.session("a", start=clip(9)) as session:
        stream = session.stream(seconds=1.5)
        assert (stream.chunks, stream.frames) == (2, 24)
        assert sum(len(chunk.frames) for chunk in stream) == 24


def test_saved_once_the_start_is_taken_in(wide: Path, tmp_path: Path) -> None:
    with Pipeline.load(wide, threads=1) as pipe:
        with pipe.session("a", seed=1, start=clip(21)) as session:
            with pytest.raises(InputError, match="take its first chunk"):
                session.save(tmp_path / "state")
            stream = session.stream(chunks=3)
            next(stream)
            session.save(tmp_path / "state")
            expected = [chunk.frames for chunk in stream]
        with pipe.resume(tmp_path / "state") as session:
            found = [chunk.frames for chunk in session.stream(chunks=2)]
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    "start",
    [clip(9).astype(np.float32), clip(9)[:, :-1], clip(9)[..., :1], clip(9)[:0], clip(1)[0, 0]],
    ids=["floats", "size", "gray", "none", "row"],
)
def test_frames_of_another_kind_are_refused(path: Path, start: np.ndarray) -> None:
    with Pipeline.load(path, threads=1) as pipe:
        with pytest.raises(InputError, match=rf"expected uint8 \[{PIXELS}, {PIXELS}, 3\]"):
            pipe.session("a", start=start)
        assert pipe.health().open == 0


def test_a_bundle_without_encoder_says_so(bundle: Path) -> None:
    with Pipeline.load(bundle, threads=1) as pipe, pytest.raises(InputError, match="--with-encoder"):
        pipe.session("a", start=clip(9))


def test_nothing_is_allocated_for_a_start(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = OnGpu()
    monkeypatch.setattr(pipeline_module, "load_engine", load)
    with Pipeline.load(path) as pipe:
        allocations, captures = load.driver.allocations, load.driver.captures
        with pipe.session("a", start=clip(9)) as session:
            next(session.stream(chunks=1))
        assert (load.driver.allocations, load.driver.captures) == (allocations, captures)


@pytest.mark.parametrize("planted", ["shape", "missing", "renamed", "half"])
def test_the_dry_run_finds_what_does_not_fit(make_bundle: MakeBundle, tmp_path: Path, planted: str) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(make_bundle(with_encoder=True), folder)

    def edit(raw: dict) -> None:  # type: ignore[type-arg]
        first, following = (raw["components"][f"vae_encode_{name}"] for name in ("first", "next"))
        if planted == "shape":
            first["outputs"][1]["shape"][0] += 1
        elif planted == "missing":
            del first["outputs"][1]
        elif planted == "renamed":
            following["outputs"][0]["name"] = "latents"
        else:
            following["inputs"][0]["shape"][0] = 2

    edit_manifest(folder, edit)
    with pytest.raises(BundleError, match="vae_encode_"):
        dry_run(load_bundle(folder, verify=False))
