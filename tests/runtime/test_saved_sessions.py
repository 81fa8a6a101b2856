"""Saving a session and going on: the same bits as without the break, here and in another process."""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import CapacityError, InputError, Pipeline, Session, SessionCancelledError
from tests.runtime.conftest import MakeBundle

CHUNKS = 12
SWITCH = 7
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(bundle, sessions=3, threads=1) as pipeline:
        yield pipeline


def open_session(pipe: Pipeline) -> Session:
    session = pipe.session("a red fox", seed=3, label="first")
    session.set_prompt("snow in sea", at=SWITCH, over=2, label="second")
    return session


def whole(pipe: Pipeline) -> list[tuple[str | None, bytes]]:
    with open_session(pipe) as session:
        return [(chunk.label, chunk.frames.tobytes()) for chunk in session.stream(chunks=CHUNKS)]


def take(stream: Iterator[Any], count: int) -> list[tuple[str | None, bytes]]:
    return [(chunk.label, chunk.frames.tobytes()) for chunk in itertools.islice(stream, count)]


@pytest.mark.parametrize("at", [0, 1, 3, 6, 7, 8, 10])
@pytest.mark.parametrize("window", [8, 20])
def test_the_same_bits_as_without_the_break(
    make_bundle: MakeBundle, tmp_path: Path, at: int, window: int
) -> None:
    """At the start, with the window filling and sliding, before, in and after a transition; in another place."""
    with Pipeline.load(make_bundle(window_frames=window), sessions=3, threads=1) as pipe:
        expected = whole(pipe)
        with open_session(pipe) as session, pipe.session("a"):
            before = take(iter(session.stream()), at)
            session.save(tmp_path / "state.lfs")
            with pipe.resume(tmp_path / "state.lfs") as resumed:
                assert resumed.index >= at and resumed.state == "open"
                after = take(iter(resumed.stream()), CHUNKS - at)
                assert resumed.statistics.chunks >= CHUNKS
            rest = take(iter(session.stream()), CHUNKS - at)  # the session itself goes on too
    assert before + after == expected
    assert before + rest == expected


def test_in_another_process(bundle: Path, pipe: Pipeline, tmp_path: Path) -> None:
    expected = whole(pipe)
    with open_session(pipe) as session:
        take(iter(session.stream()), 5)
        session.save(tmp_path / "state.lfs")
    code = f"""
import hashlib, json
from runtime import Pipeline
with Pipeline.load({str(bundle)!r}, threads=1) as pipe, pipe.resume({str(tmp_path / "state.lfs")!r}) as session:
    chunks = list(session.stream(chunks={CHUNKS - 5}))
print(json.dumps([[chunk.index, chunk.label, hashlib.sha256(chunk.frames.tobytes()).hexdigest()] for chunk in chunks]))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert json.loads(result.stdout) == [
        [index, label, hashlib.sha256(frames).hexdigest()]
        for index, (label, frames) in list(enumerate(expected))[5:]
    ]


def test_saving_while_the_stream_runs(pipe: Pipeline, tmp_path: Path) -> None:
    """At an arbitrary moment: with a chunk under way, and one that was finished and not delivered."""
    expected = whole(pipe)
    with open_session(pipe) as session:
        taken: list[tuple[str | None, bytes]] = []
        thread = threading.Thread(target=lambda: taken.extend(take(iter(session.stream()), CHUNKS)))
        thread.start()
        saved = []
        while thread.is_alive():
            path = tmp_path / f"{len(saved)}.lfs"
            session.save(path)
            saved.append(path)
            time.sleep(0.005)
        thread.join()
    assert taken == expected and len(saved) >= 2
    for path in (saved[0], saved[len(saved) // 2]):
        with pipe.resume(path) as resumed:
            first = resumed.index
            rest = list(resumed.stream(chunks=max(1, CHUNKS - first)))
            for chunk in rest:
                if chunk.index < CHUNKS:
                    assert (chunk.label, chunk.frames.tobytes()) == expected[chunk.index]


def test_a_saved_session_needs_a_place(bundle: Path, tmp_path: Path) -> None:
    with Pipeline.load(bundle, threads=1) as pipe, pipe.session("a") as session:
        session.save(tmp_path / "state.lfs")
        with pytest.raises(CapacityError):
            pipe.resume(tmp_path / "state.lfs")


def test_a_session_that_is_over_is_not_saved(pipe: Pipeline, tmp_path: Path) -> None:
    with pipe.session("a") as session:
        session.cancel()
        with pytest.raises(SessionCancelledError):
            session.save(tmp_path / "state.lfs")
    assert not list(tmp_path.iterdir())


def test_another_bundle_refuses_it(pipe: Pipeline, make_bundle: MakeBundle, tmp_path: Path) -> None:
    with pipe.session("a") as session:
        session.save(tmp_path / "state.lfs")
    other = make_bundle(window_frames=14)
    with (
        Pipeline.load(other, threads=1) as elsewhere,
        pytest.raises(InputError, match="saved with another bundle"),
    ):
        elsewhere.resume(tmp_path / "state.lfs")


def test_unusable_files(pipe: Pipeline, tmp_path: Path) -> None:
    with pipe.session("a") as session:
        list(session.stream(chunks=2))
        session.save(tmp_path / "state.lfs")
        with pytest.raises(InputError, match="does not exist"):
            session.save(tmp_path / "missing" / "state.lfs")
    good = (tmp_path / "state.lfs").read_bytes()
    for content in (b"", b"nonsense", good[: len(good) // 2]):
        (tmp_path / "bad.lfs").write_bytes(content)
        with pytest.raises(InputError, match="is no saved session"):
            pipe.resume(tmp_path / "bad.lfs")
    with pytest.raises(InputError, match="is no saved session"):
        pipe.resume(tmp_path / "missing.lfs")
    with np.load(tmp_path / "state.lfs") as file:
        arrays = {name: file[name] for name in file.files}
    meta = json.loads(arrays["meta"].tobytes())

    def refuse(message: str, **changes: Any) -> None:
        changed = json.dumps({**meta, **changes}).encode()
        with (tmp_path / "bad.lfs").open("wb") as file:
            np.savez(file, **{**arrays, "meta": np.frombuffer(changed, np.uint8)})
        with pytest.raises(InputError, match=message):
            pipe.resume(tmp_path / "bad.lfs")

    refuse("contradicts itself", started=5)
    refuse("does not fit", table={**meta["table"], "free": [0]})
    refuse("no saved session", side=2)
    refuse("no saved session", surprise=1)
    for name in list(arrays):
        if name.startswith("buffer.past_"):
            arrays[name] = arrays[name][:-1]
    refuse("the saved session holds")
    with pipe.session("a"), pipe.session("a"), pipe.session("a"):
        pass  # no place was lost
