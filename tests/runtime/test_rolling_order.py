"""The order of a rolling rollout's forwards, and which frames each of them sees, against lists written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.bundle import Manifest, load_bundle
from runtime.engine import JointChunk, Placement
from runtime.errors import SessionCancelledError
from runtime.frame_table import ABSENT, LatentRing, Move
from runtime.rollout import PromptSwitch, RollingRollout, rollout_kind
from tests.runtime import device_bundles as device

WINDOW, CHUNK = 12, 3  # slots of the pool before those of the sessions: four chunks


class Recorder:
    """Keeps what a rollout asks of its engine, and which frame lies in which slot of the pool."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.pool: dict[int, int] = {}
        self.cleaned = -1

    def reset(self, session: int) -> None:
        self.calls.append(("reset",))

    def condition(self, session: int, embedding: np.ndarray) -> float:
        self.calls.append(("condition", float(embedding[0, 0])))
        return 0.0

    def begin(self, session: int, placement: Placement, noise: np.ndarray | None) -> None:
        assert noise is None
        self.cleaned = placement.chunk
        self.calls.append(("clean", placement.chunk, self.frames(placement.frame_slots), placement.latent))
        assert placement.first_frame == CHUNK * placement.chunk

    def clean(self, session: int) -> float:
        return 0.0

    def denoise_window(
        self,
        session: int,
        chunk: int,
        chunks: Sequence[JointChunk],
        frame_slots: Sequence[int],
        noise: np.ndarray,
    ) -> float:
        members = [one.first_frame // CHUNK for one in chunks]
        assert members == list(range(members[0], chunk + 1))
        for one in chunks[:-1]:
            self.pool |= {move.slot: move.frame for move in one.moves}
        self.calls.append(("window", members, self.frames(frame_slots), noise[:, 0, 0, 0, 0].tolist()))
        if len(chunks) == 5:
            self.calls.append(("left", members[0], chunks[0].latent))
        return 1.0

    def commit(self, session: int, moves: Sequence[Move]) -> None:
        assert [move.frame for move in moves] == [3 * self.cleaned + index for index in range(3)]
        self.pool |= {move.slot: move.frame for move in moves}

    def place_sinks(self, session: int, slots: Sequence[int], shift: int) -> None:
        self.calls.append(("anchor", self.frames(slots), shift))

    def frames(self, slots: Sequence[int]) -> list[int]:
        return [self.pool[slot] for slot in slots if slot != ABSENT]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    raw = load_bundle(device.build_device_bundle(tmp_path / "device")).manifest.model_dump()
    sigmas = [1.0, 0.9523810, 0.8823529, 0.7692308, 0.5555556, 0.0]
    raw["schedule"] = {"timesteps": [1000 * s for s in sigmas], "sigmas": sigmas, "rolling": True}
    raw["sparsity"] |= {"target": 0.0, "base": 0.0}
    raw["cache"] |= {"window_frames": 21, "max_past_frames": 18, "recache": "none"}
    return Manifest.model_validate(raw)


def start(manifest: Manifest, session: int = 0) -> tuple[Recorder, RollingRollout]:
    recorder = Recorder()
    model = manifest.model
    shape = (model.latent_channels, model.chunk_frames, model.latent_height, model.latent_width)

    def noise(chunk: int, step: int) -> np.ndarray:
        return np.full(shape, 10 * chunk + step, dtype=np.float32)

    kind = rollout_kind(manifest)
    assert kind is RollingRollout
    return recorder, kind(recorder, session, manifest, seed=0, noise=noise)  # type: ignore[return-value,arg-type]


def prompt(value: float) -> PromptSwitch:
    return PromptSwitch(np.full((1, 1), value, dtype=np.float32), "none")


def test_eleven_chunks_against_lists(manifest: Manifest) -> None:
    recorder, rollout = start(manifest)
    expected: list[tuple[Any, ...]] = [("reset",), ("condition", 1.0)]
    committed: list[int] = []
    latents = LatentRing(chunk_frames=3, sink_frames=3, past_frames=21)
    for chunk in range(11):
        seconds = rollout.advance(prompt(1.0) if chunk == 0 else None, lambda: False)
        if chunk:
            seen = committed[-18:]
            if 0 in seen:  # where it was committed, seen together with what came right behind it
                expected.append(("anchor", [0, 1, 2], 0))
            expected.append(("clean", chunk - 1, seen, latents.slot(chunk - 1)))
            committed += range(3 * chunk - 3, 3 * chunk)
            # 21 besides the anchor's three would be seen by nothing.
            committed = [frame for frame in committed if frame < 3 or frame >= 3 * chunk - 18]
        for newest in range(0 if chunk == 0 else chunk + 4, chunk + 5):
            members = list(range(chunk, newest + 1))
            own = list(range(3 * chunk, 3 * newest))
            past = [*committed[:3], *committed[3:][-3:]]
            if past:
                shift = (3 * chunk if chunk == 1 else 3 * chunk - 3) - 3
                expected.append(("anchor", [0, 1, 2], shift))
            noise = [10.0 * newest, *(10.0 * (newest - n + 1) + n for n in range(1, 5))]
            call = recorder.calls[len(expected)]
            known = 1 + min(len(members), 4)
            expected.append(("window", members, past + own, [*noise[:known], *call[3][known:]]))
        expected.append(("left", chunk, latents.slot(chunk)))
        assert recorder.calls == expected
        assert seconds == (5.0 if chunk == 0 else 1.0)


def test_sessions_share_the_slots_of_the_window_and_nothing_else(manifest: Manifest) -> None:
    pools = []
    for session in range(3):
        recorder, rollout = start(manifest, session)
        for _ in range(10):
            rollout.advance(prompt(1.0), lambda: False)
        pools.append(set(recorder.pool))
    assert [sorted(pool)[:WINDOW] for pool in pools] == [list(range(WINDOW))] * 3
    own = [sorted(pool)[WINDOW:] for pool in pools]
    assert own == [list(range(WINDOW + 21 * session, WINDOW + 21 * (session + 1))) for session in range(3)]


def test_a_prompt_comes_between_the_clean_forward_and_the_next_window(manifest: Manifest) -> None:
    recorder, rollout = start(manifest)
    for chunk in range(3):
        rollout.advance(prompt(float(chunk)), lambda: False)
    names = [call[0] for call in recorder.calls]
    second = names.index("condition", names.index("condition") + 1)
    assert names[second - 1 : second + 3] == ["clean", "condition", "anchor", "window"]


def test_it_ends_between_two_windows(manifest: Manifest) -> None:
    recorder, rollout = start(manifest)
    asked = iter([False, False, True])
    with pytest.raises(SessionCancelledError):
        rollout.advance(prompt(1.0), lambda: next(asked))
    assert [call[0] for call in recorder.calls].count("window") == 2
