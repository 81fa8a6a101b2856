"""Thousands of chunks of sessions that come, switch prompts, are closed or forgotten; memory and files stay flat."""

from __future__ import annotations

import gc
import os
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from runtime import Pipeline, Session

_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


@dataclass
class Soak:
    """What was done, and what the process held: samples of (chunks, resident bytes, descriptors, threads)."""

    chunks: int = 0
    sessions: int = 0
    switches: int = 0
    dropped: int = 0
    seconds: float = 0.0
    samples: list[tuple[int, int, int, int]] = field(default_factory=list)

    def growth(self) -> tuple[int, int, int]:
        """Resident bytes, descriptors and threads: the last fifth's most, above the second fifth's most."""
        fifth = len(self.samples) // 5
        early, late = self.samples[fifth : 2 * fifth], self.samples[-fifth:]
        before, after = ([max(sample[at] for sample in part) for at in (1, 2, 3)] for part in (early, late))
        return after[0] - before[0], after[1] - before[1], after[2] - before[2]

    def to_json(self) -> dict[str, object]:
        resident, descriptors, threads = self.growth()
        grown = {"resident_bytes": resident, "descriptors": descriptors, "threads": threads}
        return {**asdict(self), "growth": grown}


def soak(bundle: Path, chunks: int, seed: int) -> Soak:
    """Run `chunks` chunks of a pipeline of two places."""
    chance = random.Random(seed)
    found = Soak()
    begun = time.perf_counter()
    with Pipeline.load(bundle, sessions=2, threads=1) as pipe:
        text = pipe.manifest.text
        prompts = [
            np.asarray(np.random.default_rng(at).standard_normal((text.text_len, text.dim)), np.float32)
            for at in range(8)
        ]
        while found.chunks < chunks:
            _together(pipe, prompts, chance, found)
            gc.collect()
            found.samples.append((found.chunks, *_held()))
    found.seconds = round(time.perf_counter() - begun, 1)
    return found


def _together(pipe: Pipeline, prompts: list[np.ndarray], chance: random.Random, found: Soak) -> None:
    """Two sessions in turns, for a while; one of them is closed and the other may be forgotten."""
    opened: list[Session] = [
        pipe.session(embedding=chance.choice(prompts), seed=chance.randrange(1 << 32)) for _ in range(2)
    ]
    found.sessions += 2
    streams = [session.stream() for session in opened]
    for _ in range(chance.randint(5, 40)):
        at = chance.randrange(2)
        chunk = next(streams[at])
        assert chunk.frames.dtype == np.uint8
        found.chunks += 1
        if chance.random() < 0.15:
            recache = chance.choice(("window", "all", "none"))
            opened[at].set_prompt(embedding=chance.choice(prompts), recache=recache)
            found.switches += 1
    opened[0].close()
    if chance.random() < 0.5:
        opened[1].close()
    else:
        found.dropped += 1
    del opened, streams


def _held() -> tuple[int, int, int]:
    """Resident bytes, descriptors and threads of this process; zeros where there is no /proc."""
    own = Path("/proc/self")
    if not own.is_dir():
        return 0, 0, 0
    resident = int((own / "statm").read_text().split()[1]) * _PAGE
    return resident, len(os.listdir(own / "fd")), len(os.listdir(own / "task"))
