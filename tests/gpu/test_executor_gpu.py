"""The CUDA executor on a GPU: against the host, replayed and one by one, for long, and with several sessions."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.bundle import load_bundle
from runtime.cuda.driver import CudaDriver, RowCopy, host_bytes
from runtime.cuda.engine import CudaEngine, load_cuda_engine
from runtime.errors import EngineError
from runtime.pipeline import Pipeline
from runtime.program.buffers import plan_buffers
from tests.runtime import device_bundles

NO_GPU = "" if torch.cuda.is_available() else "PyTorch finds no CUDA device"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)]

BundleNamed = Callable[[str], Path]

EMBEDDING = np.random.default_rng(4).standard_normal((64, 64), dtype=np.float32)
SOAK_CHUNKS = 500


@pytest.fixture(scope="module", params=["inductor-bf16", "tensorrt-rtx-bf16"])
def bundle(request: pytest.FixtureRequest, bundle_named: BundleNamed) -> Path:
    return bundle_named(request.param)


@pytest.fixture(scope="module")
def host_bundle(bundle_named: BundleNamed) -> Path:
    return bundle_named("host")


@pytest.fixture
def engine(bundle: Path) -> Iterator[CudaEngine]:
    engine = load_cuda_engine(load_bundle(bundle), 1)
    engine.warmup()
    yield engine
    engine.close()


def loaded(path: Path, **options: Any) -> Pipeline:
    """Without verification: whether components compute their golden vectors is a test of its own."""
    return Pipeline.load(path, **{"text_encoder": "external", "verify": False, **options})


def frames(pipe: Pipeline, seed: int, chunks: int, embedding: np.ndarray = EMBEDDING) -> np.ndarray:
    with pipe.session(embedding=embedding, seed=seed) as session:
        return np.concatenate([chunk.frames for chunk in session.stream(chunks=chunks)])


def served(path: Path, engine: CudaEngine) -> Pipeline:
    plan = plan_buffers(load_bundle(path).manifest, engine.program.sessions)
    return Pipeline(load_bundle(path), plan, engine, None)


def test_copies_rows_events_and_graphs() -> None:
    driver = CudaDriver()
    one, two = driver.create_stream(), driver.create_stream()
    event = driver.create_event()
    device, pinned = driver.alloc(4096), driver.alloc_pinned(4096)
    try:
        assert device % 256 == 0
        assert driver.is_done(event), "an event that was never recorded is done"
        memory = host_bytes(pinned, 4096)
        memory[:] = np.arange(4096, dtype=np.uint8)
        driver.zero(device, 4096, one)
        driver.copy(device, pinned, 1024, one)
        driver.record(event, one)
        driver.wait(two, event)
        graph = driver.capture(
            lambda: driver.copy_rows(RowCopy(device + 2048, 8, device, 32, 8, 4), two), two
        )
        graph.launch(two)
        driver.sync(two)
        driver.copy(pinned + 1024, device + 2048, 64, two)
        driver.sync(two)
        rows = np.arange(128, dtype=np.uint8).reshape(4, 32)[:, :8].reshape(-1)
        assert np.array_equal(memory[1024 : 1024 + 32], rows)
        assert not memory[1024 + 32 : 1024 + 64].any()
        graph.close()
        free, total = driver.memory()
        assert 0 < free < total
        with pytest.raises(EngineError, match="cuMemAlloc failed"):
            driver.alloc(1 << 50)
    finally:
        driver.free(device)
        driver.free_pinned(pinned)
        driver.destroy([one, two], [event])


def test_the_rollout_is_near_that_on_the_host(bundle: Path, host_bundle: Path) -> None:
    rolled = []
    for path in (bundle, host_bundle):
        with loaded(path) as pipe, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rolled.append(frames(pipe, seed=3, chunks=5).astype(int))
    gap = np.abs(rolled[0] - rolled[1]).mean()
    assert rolled[1].std() > 5
    assert gap < 3, f"frames differ by {gap:.2f} levels on average"


def test_graphs_replay_what_was_enqueued_one_by_one(bundle: Path, engine: CudaEngine) -> None:
    """Slots, chunk and positions change at every replay, for the window slides."""
    with served(bundle, engine) as pipe:
        executor = engine.executor
        replayed = frames(pipe, seed=1, chunks=8)
        before = executor.counters.graph_launches
        record, executor._ran = executor._ran, _Never()
        assert np.array_equal(frames(pipe, seed=1, chunks=8), replayed)
        assert executor.counters.graph_launches == before, "not run one by one"
        executor._ran = record
        assert np.array_equal(frames(pipe, seed=1, chunks=8), replayed)


class _Never(set[str]):
    """A set of forwards that have run, which remembers none."""

    def add(self, item: str) -> None:
        pass


def test_without_graphs_the_bits_are_the_same(bundle: Path) -> None:
    with loaded(bundle) as pipe:
        replayed = frames(pipe, seed=1, chunks=4)
    with loaded(bundle, graphs=False) as pipe:
        assert np.array_equal(frames(pipe, seed=1, chunks=4), replayed)
        assert pipe.engine.executor.counters.graph_launches == 0  # type: ignore[attr-defined]


def test_sessions_are_isolated_bit_for_bit(bundle: Path) -> None:
    with loaded(bundle, sessions=3) as pipe:
        alone = [frames(pipe, seed, 5, sign * EMBEDDING) for seed, sign in ((1, 1), (2, -1), (3, 0.5))]
        opened = [
            pipe.session(embedding=sign * EMBEDDING, seed=seed) for seed, sign in ((1, 1), (2, -1), (3, 0.5))
        ]
        streams = [session.stream(chunks=5) for session in opened]
        turns = [[next(stream).frames for stream in streams] for _ in range(5)]
        for number, session in enumerate(opened):
            assert np.array_equal(np.concatenate([turn[number] for turn in turns]), alone[number])
            session.close()


def test_frames_on_the_device_are_those_on_the_host(bundle: Path) -> None:
    with loaded(bundle) as pipe:
        expected = frames(pipe, seed=2, chunks=6)
        with pipe.session(embedding=EMBEDDING, seed=2, frames="device") as session:
            found = [torch.from_dlpack(chunk.frames) for chunk in session.stream(chunks=6)]  # type: ignore[attr-defined]
        assert all(tensor.is_cuda for tensor in found)
        assert np.array_equal(torch.cat(found).cpu().numpy(), expected)


@pytest.mark.parametrize("recache", ["window", "all", "none"])
def test_a_prompt_switch_is_near_that_on_the_host(bundle: Path, host_bundle: Path, recache: str) -> None:
    rolled = []
    for path in (bundle, host_bundle):
        with (
            loaded(path) as pipe,
            pipe.session(embedding=EMBEDDING, seed=3) as session,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            session.set_prompt(embedding=-EMBEDDING, recache=recache, at=3)
            rolled.append(np.concatenate([chunk.frames for chunk in session.stream(chunks=5)]).astype(int))
    assert np.abs(rolled[0] - rolled[1]).mean() < 3


def test_a_prompt_is_encoded_as_on_the_host(bundle: Path, host_bundle: Path) -> None:
    embeddings = []
    for path in (bundle, host_bundle):
        with loaded(path, warmup=False, text_encoder="on-demand") as pipe:
            embeddings.append(pipe.embed("a red fox in snow"))
    error = np.linalg.norm(embeddings[0] - embeddings[1]) / np.linalg.norm(embeddings[1])
    assert error < 3e-2


def test_many_chunks_take_no_more_memory(bundle: Path) -> None:
    """As the next one, it fails where something else uses the GPU at the same time."""
    driver = CudaDriver()
    with (
        loaded(bundle) as pipe,
        pipe.session(embedding=EMBEDDING, seed=0) as session,
    ):
        counters = pipe.engine.executor.counters  # type: ignore[attr-defined]
        stream = session.stream(chunks=SOAK_CHUNKS)
        for _ in range(10):
            next(stream)
        gc.collect()
        free, resident, operations = driver.memory()[0], resident_bytes(), counters.operations
        checksum = 0
        for chunk in stream:
            checksum ^= hash(chunk.frames[::4, ::16, ::16].tobytes())
        gc.collect()
        assert counters.operations == operations, "a forward was enqueued one by one"
        assert free - driver.memory()[0] <= 2 << 20
        assert resident_bytes() - resident <= 32 << 20


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_everything_is_given_back(bundle: Path) -> None:
    with loaded(bundle) as pipe:
        frames(pipe, 0, 1)
    gc.collect()
    torch.cuda.empty_cache()
    free = CudaDriver().memory()[0]
    for _ in range(3):
        with loaded(bundle) as pipe:
            frames(pipe, 0, 1)
    gc.collect()
    torch.cuda.empty_cache()
    assert free - CudaDriver().memory()[0] <= 16 << 20


def test_a_bundle_for_another_gpu_is_refused(tmp_path: Path) -> None:
    if torch.cuda.get_device_capability() == (12, 0):
        pytest.skip("the bundle is for this GPU")
    path = device_bundles.build_device_bundle(tmp_path / "bundle")
    with pytest.raises(EngineError, match=r"was built for rtx5090, compute capability 12\.0"):
        Pipeline.load(path)
