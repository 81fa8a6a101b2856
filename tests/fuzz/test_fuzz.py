"""A small part of `make fuzz`, the same at every run; and the soak, in the slow tier."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from tests.runtime import handmade

from .campaigns import CAMPAIGNS, prepare
from .damage import damaged
from .soak import soak
from .worker import Trials

SEED, TRIALS = 20261128, 4


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    prepare(folder)
    return folder


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_nothing_ends_in_what_is_wrong(prepared: Path, name: str) -> None:
    found = list(Trials(name, SEED, prepared).run(0, TRIALS, 300.0))
    assert [number for number, _, _ in found] == list(range(TRIALS))
    assert not [trial for trial in found if trial[1] == "wrong"]


def test_a_trial_that_crashes_hangs_or_raises_is_wrong_and_the_next_goes_on(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prepared / "frames").rename(tmp_path / "frames")
    try:
        # Every trial that loads a bundle fails to compare it.
        found = list(Trials("manifest changes", SEED, prepared / "nowhere").run(5, 3, 300.0))
    finally:
        (tmp_path / "frames").rename(prepared / "frames")
    assert [(number, outcome) for number, outcome, _ in found] == [(5, "wrong"), (6, "wrong"), (7, "wrong")]
    assert "FileNotFoundError" in found[0][2]
    ended = list(Trials("no such campaign", SEED, prepared).run(0, 2, 300.0))
    assert [outcome for _, outcome, _ in ended] == ["wrong", "wrong"]


def test_damage_is_drawn_from_the_seed_and_changes_something() -> None:
    content = bytes(range(256)) * 4
    kinds = Counter(len(damaged(content, random.Random(seed))) - len(content) for seed in range(200))
    assert damaged(content, random.Random(1)) == damaged(content, random.Random(1))
    assert min(kinds) < 0 < max(kinds) and kinds[0] > 20
    assert sum(damaged(content, random.Random(seed)) != content for seed in range(200)) > 190


@pytest.mark.slow
def test_ten_thousand_chunks_take_no_more_memory(tmp_path: Path) -> None:
    """`benchmarks/results/reliability/soak.json` has a run of it."""
    handmade.build_bundle(tmp_path / "bundle")
    found = soak(tmp_path / "bundle", 10_000, seed=17)
    assert found.chunks >= 10_000 and found.switches > 1000 and found.dropped > 100
    resident, descriptors, threads = found.growth()
    assert resident < 4 << 20
    assert descriptors <= 0
    assert threads <= 0
