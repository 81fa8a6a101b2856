"""Whole rollouts against one written the plain way: cache, window, sinks, prompt switches, streaming decode."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import Pipeline
from tests.runtime.conftest import MakeBundle
from tests.runtime.handmade import TEXT_DIM, TEXT_LEN
from tests.runtime.naive import NaiveRollout

LONG: dict[str, Any] = {}
ABSOLUTE = {"sink_positions": "absolute", "sink_frames": 3, "window_frames": 12}
SHORT = {"window_frames": None, "sink_frames": 0, "sink_positions": "absolute", "table_frames": 12}
NARROW = {"window_frames": 5, "sink_frames": 1}  # room for one sink and a third of a chunk
SINKS_ONLY = {"window_frames": 5, "sink_frames": 2}
WIDE_SINKS = {"window_frames": 12, "sink_frames": 4}  # sinks from two chunks
FRAMEWISE = {  # one frame a chunk in two steps, the first in four
    "chunk_frames": 1,
    "window_frames": 5,
    "sink_frames": 2,
    "sigmas": (1.0, 0.8333333, 0.0),
    "first_sigmas": (1.0, 0.9375, 0.8333333, 0.625),
}
ONE_STEP = {"sigmas": (1.0, 0.0), "first_sigmas": (1.0, 0.8333333)}
AS_DENOISED = {
    "clean_forward": False,
    "first_sigmas": (1.0, 0.5),
}  # fewer steps in the first chunk than later


def embedding(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((TEXT_LEN, TEXT_DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def load() -> Iterator[Callable[[Path], Pipeline]]:
    """Loads each bundle once, so that rollouts follow each other in the same slots."""
    with ExitStack() as stack:
        yield functools.cache(lambda folder: stack.enter_context(Pipeline.load(folder, threads=1)))


@pytest.mark.parametrize(
    "options", [LONG, ABSOLUTE, SHORT, NARROW, SINKS_ONLY, WIDE_SINKS, FRAMEWISE, ONE_STEP, AS_DENOISED]
)
@pytest.mark.parametrize(
    ("switch_at", "recache"),
    [
        (None, "window"),
        *itertools.product([1, 2, 6], ["window", "all", "flush", "cut"]),
        (1, "none"),
        (6, "none"),
    ],
)
def test_against_the_plain_rollout(
    make_bundle: MakeBundle,
    load: Callable[[Path], Pipeline],
    options: dict[str, Any],
    switch_at: int | None,
    recache: Any,
) -> None:
    folder = make_bundle(**options)
    chunks = 9
    naive = NaiveRollout(folder, embedding(0), seed=5)
    expected = []
    for index in range(chunks):
        if index == switch_at:
            naive.set_prompt(embedding(1), recache)
        expected.append(naive.next_chunk().tobytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # SHORT runs past its table
        with load(folder).session(embedding=embedding(0), seed=5) as session:
            if switch_at is not None:
                assert session.set_prompt(embedding=embedding(1), recache=recache, at=switch_at) == switch_at
            streamed = [chunk.frames.tobytes() for chunk in session.stream(chunks=chunks)]
    assert streamed == expected


def clip(folder: Path, switch: dict[str, Any] | None = None, chunks: int = 8) -> list[bytes]:
    with Pipeline.load(folder, threads=1) as pipe, pipe.session(embedding=embedding(0), seed=5) as session:
        if switch:
            session.set_prompt(embedding=embedding(1), **switch)
        return [chunk.frames.tobytes() for chunk in session.stream(chunks=chunks)]


def test_prompt_switch_changes_nothing_before_its_chunk_and_everything_after(bundle: Path) -> None:
    plain = clip(bundle)
    for recache in ("window", "all", "none"):
        switched = clip(bundle, {"at": 4, "recache": recache})
        assert switched[:4] == plain[:4]
        assert all(a != b for a, b in zip(switched[4:], plain[4:], strict=True))


def test_recache_modes_differ(bundle: Path) -> None:
    clips = [tuple(clip(bundle, {"at": 4, "recache": recache})) for recache in ("window", "all", "none")]
    assert len(set(clips)) == 3


def test_last_of_several_switches_counts(bundle: Path) -> None:
    with Pipeline.load(bundle, threads=1) as pipe, pipe.session(embedding=embedding(0), seed=5) as session:
        session.set_prompt(embedding=embedding(9), at=2, recache="all")
        session.set_prompt(embedding=embedding(8), at=4, recache="all")
        session.set_prompt(embedding=embedding(1), at=4)
        session.set_prompt(embedding=embedding(0), at=2, recache="none")
        frames = [chunk.frames.tobytes() for chunk in session.stream(chunks=8)]
    # Going over to the prompt it already has, without re-caching, changes nothing.
    assert frames == clip(bundle, {"at": 4})


def test_first_prompt_can_be_replaced_before_the_start(bundle: Path) -> None:
    with Pipeline.load(bundle, threads=1) as pipe, pipe.session(embedding=embedding(3), seed=5) as session:
        assert session.set_prompt(embedding=embedding(0)) == 0
        assert [chunk.frames.tobytes() for chunk in session.stream(chunks=4)] == clip(bundle, chunks=4)


def test_short_mode_warns_once_past_its_table(make_bundle: MakeBundle) -> None:
    with Pipeline.load(make_bundle(**SHORT), threads=1) as pipe, pipe.session("a fox") as session:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            list(session.stream(chunks=4))
        with pytest.warns(UserWarning, match="past the 12 frames that this bundle was planned for") as caught:
            list(session.stream(chunks=3))
    assert len(caught) == 1


def test_long_mode_never_warns(bundle: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Pipeline.load(bundle, threads=1) as pipe, pipe.session("a fox") as session:
            assert len(list(session.stream(chunks=12))) == 12
