"""The runtime on the real thing: the `tiny` preset, built for the CPU."""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from export.compare.reference import Reference
from lightforcing_ref.decoders.vae import to_uint8
from lightforcing_ref.decoders.vae_encoder import from_uint8
from runtime import Pipeline
from runtime.bundle import load_bundle
from runtime.cli.bench import measure
from runtime.cli.main import main
from runtime.session import Session
from runtime.verify.dry_run import dry_run
from tests.runtime.conftest import MakeBundle
from tests.runtime.naive import NaiveRollout

CHUNKS = 3
PROMPTS = ("a red fox in fresh snow", "a lighthouse in a storm")


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Iterator[Pipeline]:
    """Room for two sessions."""
    with Pipeline.load(tiny_bundle, sessions=2, threads=1) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def alone(pipe: Pipeline) -> list[list[bytes]]:
    """The clip of each prompt, made by itself."""
    clips = []
    for seed, prompt in enumerate(PROMPTS):
        with pipe.session(prompt, seed=seed) as session:
            clips.append(take(session))
    return clips


def take(session: Session) -> list[bytes]:
    return [chunk.frames.tobytes() for chunk in session.stream(chunks=CHUNKS)]


def test_sessions_side_by_side_equal_each_alone(pipe: Pipeline, alone: list[list[bytes]]) -> None:
    with pipe.session(PROMPTS[0], seed=0) as one, pipe.session(PROMPTS[1], seed=1) as two:
        pairs = zip(one.stream(chunks=CHUNKS), two.stream(chunks=CHUNKS), strict=True)
        together = [(a.frames.tobytes(), b.frames.tobytes()) for a, b in pairs]
    assert together == list(zip(*alone, strict=True))
    assert alone[0] != alone[1]


def test_against_the_plain_rollout_with_a_prompt_switch(
    pipe: Pipeline, tiny_bundle: Path, alone: list[list[bytes]]
) -> None:
    naive = NaiveRollout(tiny_bundle, pipe.embed(PROMPTS[0]), seed=0)
    expected = [naive.next_chunk().tobytes() for _ in range(CHUNKS - 1)]
    assert expected == alone[0][:-1]
    naive.set_prompt(pipe.embed(PROMPTS[1]), "window")
    expected.append(naive.next_chunk().tobytes())
    with pipe.session(PROMPTS[0], seed=0) as session:
        session.set_prompt(PROMPTS[1], at=CHUNKS - 1)
        assert take(session) == expected
    assert expected[-1] != alone[0][-1]


def test_starting_from_a_video_equals_the_reference(pipe: Pipeline, tiny_bundle: Path) -> None:
    """Encoder, committed frames, the chunks behind them and the decoder's past: PyTorch and the bundle agree."""
    manifest = pipe.manifest
    model = manifest.model
    rng = np.random.default_rng(3)
    ramp = rng.integers(0, 256, (21, 4, 4, 3)).astype(np.uint8)
    start = ramp.repeat(model.video_height // 4, axis=1).repeat(model.video_width // 4, axis=2)
    with pipe.session(PROMPTS[0], seed=2, start=start) as session:
        found = np.concatenate([chunk.frames for chunk in session.stream(chunks=2)])
    reference = Reference.of(manifest)
    rollout = reference.rollout(manifest, torch.from_numpy(pipe.embed(PROMPTS[0])), seed=2)
    encoder = reference.weights.vae_encoder()
    latents = encoder.encode(from_uint8(torch.from_numpy(start))).transpose(0, 1)
    for given in latents.split(model.chunk_frames, dim=1):
        rollout.give_chunk(given)
    whole = torch.cat([latents, *rollout.stream(2)], dim=1)
    video = to_uint8(reference.decoder.decode(whole.transpose(0, 1)))[len(start) :].numpy()
    assert found.shape == video.shape
    assert np.abs(found.astype(int) - video.astype(int)).max() <= 1  # a value on the edge between two levels
    assert found.std() > 5


def test_the_dry_run_walks_the_encoder(tiny_bundle: Path) -> None:
    names = [forward.name for forward in dry_run(load_bundle(tiny_bundle)).forwards]
    encoding = [name for name in names if name.startswith("encode_") and name != "encode_text_layer"]
    assert encoding == ["encode_first", "encode_next.a", "encode_next.b"]


def test_overhead_is_at_most_3_percent(pipe: Pipeline) -> None:
    def overhead() -> float:
        request = {"prompt": PROMPTS[0]}
        return measure(pipe, request, chunks=3, warmup_chunks=1, sessions=1, seed=0).overhead_percent

    # Other work on the machine can only add to it.
    assert any(overhead() <= 3 for _ in range(3))


def resident_bytes() -> int:
    """Memory of this process that is in RAM; Linux only."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def seconds_of_a_chunk(session: Session) -> float:
    """Processor time of the next chunk; no work is done ahead, because its stream ends there."""
    before = time.process_time()
    assert len(list(session.stream(chunks=1))) == 1
    return time.process_time() - before


def assert_flat(folder: Path, chunks: int, settled: int, slack_bytes: int) -> None:
    """Roll out `chunks` chunks; from chunk `settled` on, memory stays where it is, and the last cost no more.

    The last ones are timed in turns with those of a younger rollout, because a machine's speed changes within seconds.
    """
    memory, ratios = [], []
    with Pipeline.load(folder, sessions=2, threads=1) as pipe:
        old, young = (pipe.session(embedding=pipe.embed("a"), seed=1) for _ in range(2))
        for count, _ in enumerate(old.stream(chunks=chunks - settled)):
            if count >= settled and count % 10 == 0:
                gc.collect()
                memory.append(resident_bytes())
        assert max(memory) - memory[0] <= slack_bytes
        for _ in young.stream(chunks=settled):
            pass
        for _ in range(settled):
            ratios.append(seconds_of_a_chunk(old) / seconds_of_a_chunk(young))
    assert statistics.median(ratios) <= 1.4


needs_statm = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc/self/statm")


@needs_statm
def test_200_chunks_are_flat(make_bundle: MakeBundle) -> None:
    """On the hand-made bundle; see the slow test below for `tiny`."""
    assert_flat(make_bundle(), chunks=200, settled=20, slack_bytes=4 << 20)


@needs_statm
@pytest.mark.slow
def test_200_chunks_of_tiny_in_long_mode_are_flat(tiny_long_bundle: Path) -> None:
    assert_flat(tiny_long_bundle, chunks=200, settled=20, slack_bytes=16 << 20)


@pytest.mark.slow
def test_five_seconds_from_the_command_line(tiny_bundle: Path, tmp_path: Path) -> None:
    clip, bench = tmp_path / "clip.mp4", tmp_path / "bench.json"
    assert main(["generate", str(tiny_bundle), "--prompt", PROMPTS[0], "--out", str(clip)]) == 0
    assert clip.stat().st_size > 10_000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # longer than the clip the bundle was planned for
        assert main(["bench", str(tiny_bundle), "--chunks", "8", "--json", str(bench)]) == 0
    assert json.loads(bench.read_text())["overhead_percent"] <= 3
