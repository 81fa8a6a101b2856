"""Programs against a rollout written the plain way: on the host, and on a simulated GPU, bit for bit."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.backends import load_engine
from runtime.bundle import Bundle, load_bundle
from runtime.bundle.weights_file import WeightsFile
from runtime.cuda.engine import CudaEngine, constants
from runtime.cuda.executor import CudaExecutor
from runtime.cuda.runner import CudaComponentRunner
from runtime.engine import Engine
from runtime.errors import BundleError, EngineError, InputError, SessionFailedError
from runtime.host.runner import HostRunner
from runtime.pipeline import Pipeline
from runtime.program.buffers import BufferPlan, plan_buffers
from runtime.program.builder import build_program
from runtime.program.engine import ProgramEngine
from runtime.program.program import View, _sample
from tests.conftest import build
from tests.runtime.conftest import MakeBundle
from tests.runtime.naive import NaiveRollout
from tests.runtime.simulated_gpu import (
    SimulatedComponent,
    SimulatedDriver,
    SimulatedLibrary,
    array_at,
    launcher,
)

Load = Callable[..., Engine]


RECACHE = ("window", "all")
"""What each session recomputes when its prompt changes before chunk 5."""


def embedding(folder: Path, seed: int) -> np.ndarray:
    text = json.loads((folder / "manifest.json").read_text())["text"]
    return np.random.default_rng(seed).standard_normal((text["text_len"], text["dim"]), dtype=np.float32)


class OnGpu:
    """Loads engines on one simulated GPU and keeps the last."""

    def __init__(self, seed: int = 0, eagerness: float = 0.2) -> None:
        self.driver = SimulatedDriver(seed, eagerness)

    def __call__(
        self,
        bundle: Bundle,
        plan: BufferPlan,
        *,
        threads: int | None = None,
        graphs: bool = True,
        device: int = 0,
    ) -> ProgramEngine:
        manifest = bundle.manifest
        program = build_program(bundle, plan)
        weights = None if manifest.segments is None else WeightsFile(bundle.path(manifest.segments.weights))
        library = SimulatedLibrary(bundle, self.driver)
        SimulatedComponent.slots = program.buffers["past_k.0"].buffer.shape[0]
        fed = constants(manifest, weights)
        self.executor = CudaExecutor(program, self.driver, library, launcher(self.driver), fed, graphs=graphs)
        return CudaEngine(bundle, program, self.driver, self.executor)


def opened(
    load: Load, path: Path, sessions: int = 1, *, graphs: bool = True, warmup: bool = True
) -> Pipeline:
    """A pipeline over an engine of `load`."""
    bundle = load_bundle(path)
    engine = load(bundle, plan_buffers(bundle.manifest, sessions), threads=1, graphs=graphs)
    return Pipeline.load(path, sessions=sessions, warmup=warmup, engine=engine)


def rollout(
    load: Load,
    path: Path,
    *,
    chunks: int = 7,
    warmup: bool = True,
    graphs: bool = True,
) -> np.ndarray:
    """Frames of several sessions taking turns, each with a prompt switch of its own."""
    frames = []
    with opened(load, path, len(RECACHE), warmup=warmup, graphs=graphs) as pipe:
        sessions = [pipe.session(embedding=embedding(path, 0), seed=number) for number in range(len(RECACHE))]
        streams = [session.stream(chunks=chunks) for session in sessions]
        for chunk in range(chunks):
            frames += [next(stream).frames for stream in streams]
            if chunk == 2:
                for session, mode in zip(sessions, RECACHE, strict=True):
                    session.set_prompt(embedding=embedding(path, 1), recache=mode, at=5)
    return np.concatenate(frames)


@functools.cache
def plain(path: Path, chunks: int = 7) -> np.ndarray:
    """The same frames, written the plain way."""
    rollouts = [NaiveRollout(path, embedding(path, 0), seed) for seed in range(len(RECACHE))]
    frames = []
    for chunk in range(chunks):
        for rollout, mode in zip(rollouts, RECACHE, strict=True):
            if chunk == 5:
                rollout.set_prompt(embedding(path, 1), mode)
            frames.append(rollout.next_chunk())
    return np.concatenate(frames)


@pytest.mark.parametrize("options", [{}, {"window_frames": None}, {"sink_positions": "absolute"}], ids=str)
def test_sessions_on_the_host_give_the_bits_of_each_alone(
    make_bundle: MakeBundle, options: dict[str, object]
) -> None:
    path = make_bundle(**options)
    expected = plain(path)
    assert expected.std() > 5
    assert np.array_equal(rollout(load_engine, path), expected)


@pytest.mark.parametrize("warmup", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize(("seed", "eagerness"), [(0, 0.0), (1, 0.3), (2, 0.6)])
def test_streams_graphs_and_pinned_memory_change_no_bit(
    bundle: Path, seed: int, eagerness: float, warmup: bool
) -> None:
    found = rollout(OnGpu(seed, eagerness), bundle, warmup=warmup)
    assert np.array_equal(found, plain(bundle))


@pytest.mark.parametrize("warmup", [True, False], ids=["warm", "cold"])
def test_without_graphs_every_operation_is_enqueued_anew(bundle: Path, warmup: bool) -> None:
    load = OnGpu(3, 0.3)
    found = rollout(load, bundle, chunks=3, warmup=warmup, graphs=False)
    assert np.array_equal(found, plain(bundle, chunks=3))
    assert (load.driver.captures, load.executor.counters.graph_launches) == (0, 0)
    assert load.executor.counters.operations > 0


@pytest.mark.parametrize("missing", ["the decoder's wait", "the wait for room", "the wait for frames"])
def test_the_simulation_shows_a_missing_wait(
    bundle: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = OnGpu(eagerness=0.0)
    if missing == "the decoder's wait":
        monkeypatch.setattr(CudaExecutor, "wait", lambda self, session, latent: None)
    elif missing == "the wait for room":
        monkeypatch.setattr(SimulatedDriver, "is_done", lambda self, event: True)
    else:
        monkeypatch.setattr(SimulatedDriver, "sync_event", lambda self, event: None)
    try:
        found = rollout(load, bundle, chunks=3)
    except SessionFailedError:  # what was read too early is no valid index
        return
    assert not np.array_equal(found, plain(bundle, chunks=3))


def test_nothing_is_allocated_or_recorded_after_loading(bundle: Path) -> None:
    load = OnGpu()
    with opened(load, bundle, 2) as pipe:
        allocations, captures = load.driver.allocations, load.driver.captures
        with pipe.session("a red fox", seed=1) as session:
            for _ in session.stream(chunks=3):
                pass
            counters = load.executor.counters
            before = (counters.graph_launches, counters.waits, counters.operations)
            for _ in session.stream(chunks=5):
                pass
        assert (load.driver.allocations, load.driver.captures) == (allocations, captures)
        # Clean, commit, sinks, four denoising forwards and three runs of the decoder; the host waits for these three.
        assert counters.graph_launches - before[0] == 5 * 10
        assert counters.operations - before[2] == 0
        assert counters.waits - before[1] >= 5 * 3
    assert not load.driver._memory, "memory was not given back"


@pytest.mark.parametrize("saved_on_gpu", [True, False], ids=["saved-on-gpu", "saved-on-host"])
def test_a_saved_session_goes_on_wherever_its_bundle_runs(
    bundle: Path, tmp_path: Path, saved_on_gpu: bool
) -> None:
    """On another device and in another place, in the middle of everything that is under way."""
    loads: list[Load] = [OnGpu(4, 0.1), load_engine]
    with opened(loads[0 if saved_on_gpu else 1], bundle, 2) as pipe:
        with pipe.session("a red fox", seed=1) as session:
            expected = [chunk.frames for chunk in session.stream(chunks=9)]
        with pipe.session("a red fox", seed=1) as session, pipe.session("snow", seed=2) as other:
            streams = session.stream(), other.stream()
            for wanted in expected[:5]:
                next(streams[1])
                assert np.array_equal(next(streams[0]).frames, wanted)
            session.save(tmp_path / "state")
            for wanted in expected[5:]:
                assert np.array_equal(next(streams[0]).frames, wanted)
    with opened(loads[1 if saved_on_gpu else 0], bundle, 2) as pipe, pipe.session("sea"):
        session = pipe.resume(tmp_path / "state")
        for wanted, chunk in zip(expected[5:], session.stream(chunks=4), strict=True):
            assert np.array_equal(chunk.frames, wanted)


def test_a_chunk_waits_for_the_device_only_for_its_frames(bundle: Path) -> None:
    """With a device that keeps up, feeding never waits."""
    load = OnGpu(eagerness=0.95)
    with opened(load, bundle) as pipe, pipe.session("a red fox", seed=1) as session:
        next(session.stream(chunks=1))
        before = load.executor.counters.waits
        chunks = 6
        for _ in session.stream(chunks=chunks):
            pass
        assert load.executor.counters.waits - before <= chunks * 3 + 2


def test_frames_on_the_device_are_handed_over_without_a_copy(bundle: Path) -> None:
    load = OnGpu()
    with opened(load, bundle) as pipe:
        with pipe.session("a red fox", seed=1) as session:
            expected = [chunk.frames for chunk in session.stream(chunks=8)]
        with pipe.session("a red fox", seed=1, frames="device") as session:
            stream = session.stream(chunks=8)
            held = np.from_dlpack(next(stream).frames)
            before = load.driver.allocations
            for wanted, chunk in zip(expected[1:], stream, strict=True):
                assert (len(chunk.frames), chunk.frames.shape) == (len(wanted), wanted.shape)
                capsule = chunk.frames.__dlpack__()  # that nobody takes anything out of
                found = np.from_dlpack(chunk.frames)
                assert np.array_equal(found, wanted)
                assert found.ctypes.data == chunk.frames.address  # type: ignore[attr-defined]
                del capsule, found, chunk
            assert np.array_equal(held, expected[0]), "memory was used again while it was held"
            # Besides the one that is held: the present chunk, the one waiting, and the one being decoded.
            assert load.driver.allocations - before <= 3, "memory is not used again"
            with pytest.raises(BufferError):
                np.from_dlpack(next(session.stream(chunks=1)).frames, copy=True)
    with Pipeline.load(bundle) as pipe, pytest.raises(InputError, match="runs on a GPU"):
        pipe.session("a red fox", frames="device")


def test_prompts_are_encoded_as_on_the_host(bundle: Path) -> None:
    with Pipeline.load(bundle, threads=1) as pipe:
        expected = [pipe.embed(prompt) for prompt in ("a red fox", "sea")]
    assert not np.array_equal(*expected)
    with opened(OnGpu(), bundle) as pipe:
        assert np.array_equal([pipe.embed(prompt) for prompt in ("a red fox", "sea")], expected)


def test_components_run_alone_as_on_the_host(bundle: Path) -> None:
    loaded = load_bundle(bundle)
    load = OnGpu()
    engine = load(loaded, plan_buffers(loaded.manifest, 1))
    runner, host = CudaComponentRunner(loaded, load.driver, load.executor), HostRunner(loaded)
    rng = np.random.default_rng(0)
    allocated = len(load.driver._memory)
    for name in ("conditioner", "text_encoder", "vae_first", "vae_next"):
        inputs = {
            spec.name: rng.standard_normal(spec.shape).astype(spec.dtype)
            for spec in loaded.component(name).inputs
        }
        found, expected = runner.run(name, inputs), host.run(name, inputs)
        assert found.keys() == expected.keys()
        for output, array in expected.items():
            assert np.array_equal(found[output], array), (name, output)
    assert len(load.driver._memory) == allocated, "memory was not given back"
    with pytest.raises(BundleError, match="no component 'nothing'"):
        runner.run("nothing", {})
    engine.close()


class _Recorded(SimulatedLibrary):
    """A library that counts how often it is closed, and may fail then as PyTorch does."""

    def __init__(self, bundle: Bundle, driver: SimulatedDriver, problem: Exception | None = None) -> None:
        super().__init__(bundle, driver)
        self.closed, self._problem = 0, problem

    def close(self) -> None:
        self.closed += 1
        if self._problem is not None:
            raise self._problem


class _Full(SimulatedDriver):
    """A device on which only so many allocations, streams and events fit."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def _take(self) -> None:
        if not self.room:
            raise EngineError("cuMemAlloc failed on CUDA device 0: out of memory")
        self.room -= 1

    def alloc(self, nbytes: int) -> int:
        self._take()
        return super().alloc(nbytes)

    alloc_pinned = alloc

    def create_stream(self) -> int:
        self._take()
        return super().create_stream()

    def create_event(self) -> int:
        self._take()
        return super().create_event()


def executor_on(driver: SimulatedDriver, library: SimulatedLibrary, loaded: Bundle) -> CudaExecutor:
    program = build_program(loaded, plan_buffers(loaded.manifest, 1))
    SimulatedComponent.slots = program.buffers["past_k.0"].buffer.shape[0]
    return CudaExecutor(program, driver, library, launcher(driver), constants(loaded.manifest, None))


def test_loading_that_does_not_fit_leaves_nothing_behind(bundle: Path) -> None:
    loaded, refused = load_bundle(bundle), 0
    for room in range(200):
        driver = _Full(room)
        library = _Recorded(loaded, driver)
        try:
            executor = executor_on(driver, library, loaded)
        except EngineError as error:
            assert "out of memory" in str(error)
            refused += 1
        else:
            executor.close()
            executor.close()
        assert (driver._memory, driver._streams, driver._events, library.closed) == ({}, {}, {}, 1), room
        if refused <= room:
            return
    raise AssertionError("never fits")


def test_closing_frees_what_it_can(bundle: Path) -> None:
    """PyTorch says of a device that has failed so in an error of its own, for every graph and at the end."""
    loaded, driver = load_bundle(bundle), SimulatedDriver()
    executor = executor_on(driver, _Recorded(loaded, driver, RuntimeError("CUDA error: 700")), loaded)
    engine = CudaEngine(loaded, build_program(loaded, plan_buffers(loaded.manifest, 1)), driver, executor)
    engine.warmup()
    for graph in executor._graphs.values():
        graph._close = fail_as_torch_does  # type: ignore[attr-defined]
    engine.close()
    assert (driver._memory, driver._streams, driver._events) == ({}, {}, {})


def fail_as_torch_does() -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["short", "long"])
def test_segmented_bundles_of_the_exporter(variant: str, tmp_path: Path) -> None:
    path = build(tmp_path / "cut", variant, execution="segmented")
    assert load_bundle(path).manifest.segments is not None
    found = rollout(load_engine, path)
    expected = plain(build(tmp_path / "whole", variant))
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    assert np.array_equal(rollout(OnGpu(), path), found)


def poison(load: OnGpu, component: str, output: str) -> None:
    """From now on an output of a component has one number that is not finite, its last."""
    part: Any = load.executor.component(component)
    enqueue, spec = part.enqueue, part._graph.outputs[output]

    def poisoned(addresses: Mapping[str, int], scratch: int, stream: int) -> None:
        enqueue(addresses, scratch, stream)
        written = array_at(addresses[output], spec.dtype, spec.shape).reshape(-1)
        load.driver.push(stream, lambda: written.__setitem__(-1, np.inf))

    part.enqueue = poisoned


@pytest.mark.parametrize("frames", ["host", "device"])
@pytest.mark.parametrize(
    ("component", "output", "message"),
    [
        ("step", "x0", "a latent that is not finite"),
        ("vae_next", "cache_out.1", "decoder gave numbers that are not"),
    ],
)
def test_numbers_that_are_not_finite_end_a_session_at_their_chunk_without_a_wait(
    bundle: Path, frames: str, component: str, output: str, message: str
) -> None:
    load = OnGpu(eagerness=0.95)
    with opened(load, bundle, graphs=False) as pipe, pipe.session("a red fox", frames=frames) as session:
        stream = session.stream(ahead=0)
        next(stream)
        before = load.executor.counters.waits
        next(stream)
        waits = load.executor.counters.waits - before
        assert waits <= (3 if frames == "host" else 1) + 1  # frames, and a feed that may have to wait
        poison(load, component, output)
        with pytest.raises(SessionFailedError, match=f"chunk 2 failed: .*{message}"):
            next(stream)


def test_what_is_looked_at_of_a_decoders_caches() -> None:
    size = 480 * 832 * 2
    for shape, looked, pitch in (
        ((1, 2, 4, 4), (2, 4, 4), None),
        ((1, 24, 2, 480, 832), (2, 2, 480, 832), None),  # channels first: as many as fit
        ((1, 96, 2, 480, 832), (2, 2, 480, 832), None),
        ((1, 2, 480, 832, 24), (96, 832 * 24), 10 * 832 * 24 * 2),  # channels last: every tenth row
        ((1, 64, 480, 832), (5, 480, 832), None),
        ((1, 480, 832, 64), (37, 832 * 64), 13 * 832 * 64 * 2),
    ):
        view = _sample(View("cache.0.a", "float16", shape))
        assert (view.shape, view.pitch) == (looked, pitch)
        assert view.nbytes <= 6 * size and view.extent <= View("", "float16", shape).nbytes
