"""Clips timed chunk by chunk, and one clip per rung looked at more closely: memory, host syncs, kernel classes."""

from __future__ import annotations

import gc
import json
import os
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from heapq import nlargest
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from benchmarks.kernel_classes import CLASSES, classify, gpu_events, part_shares
from runtime.files import temporary_folder

__all__ = [
    "MARK",
    "ChunkRecord",
    "Clip",
    "Inspection",
    "MemoryWatch",
    "Runner",
    "inspect_trace",
    "inspected_clip",
    "profiled_chunk",
    "release",
    "summarise",
    "timed_clip",
    "trace_events",
]

Seconds = float


@dataclass(frozen=True)
class ChunkRecord:
    """One delivered chunk, in seconds; `other` is the runtime's own time, None for rungs that have no runtime."""

    frames: int
    denoise: Seconds
    decode: Seconds
    other: Seconds | None = None


class Runner(Protocol):
    """A rung, ready to generate."""

    def clip(self, chunks: int) -> Iterator[ChunkRecord]:
        """A new clip from the encoded prompt on. Yields when a chunk's frames are on the host."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


@dataclass(frozen=True)
class Clip:
    """When each chunk of a clip was there, in seconds from the encoded prompt."""

    delivered: tuple[Seconds, ...]
    records: tuple[ChunkRecord, ...]

    @property
    def seconds(self) -> Seconds:
        return self.delivered[-1]

    @property
    def per_chunk(self) -> list[Seconds]:
        """Time between deliveries; the first from the encoded prompt."""
        return [end - start for start, end in zip((0.0, *self.delivered), self.delivered, strict=False)]


def timed_clip(runner: Runner, chunks: int) -> Clip:
    """Generate a clip of `chunks` chunks and time it."""
    _synchronize()
    delivered, records = [], []
    start = time.perf_counter()
    for record in runner.clip(chunks):
        delivered.append(time.perf_counter() - start)
        records.append(record)
    return Clip(tuple(delivered), tuple(records))


def summarise(clips: Sequence[Clip]) -> dict[str, Any]:
    """Medians over clips of equal length."""

    def middle(values: Iterable[Sequence[float]]) -> list[float]:
        return [median(column) for column in zip(*values, strict=True)]

    frames = [record.frames for record in clips[0].records]
    seconds = median(clip.seconds for clip in clips)
    denoise, decode = (
        middle([getattr(record, part) for record in clip.records] for clip in clips)
        for part in ("denoise", "decode")
    )
    result: dict[str, Any] = {
        "repeats": len(clips),
        "latency_s": seconds,
        "latencies_s": [clip.seconds for clip in clips],
        "frames": sum(frames),
        "fps": sum(frames) / seconds,
        "first_frames_s": median(clip.delivered[0] for clip in clips),
        "chunk_s": middle(clip.per_chunk for clip in clips),
        "denoise_s": denoise,
        "decode_s": decode,
        "runtime_percent": None,
    }
    if clips[0].records[0].other is not None:
        result["runtime_percent"] = median(_runtime(clip) for clip in clips)
    return result


def _runtime(clip: Clip) -> float:
    """Time outside the engines in percent of all time spent on chunks, as `python -m runtime bench` counts it."""
    other = sum(record.other or 0.0 for record in clip.records)
    return (
        100 * other / sum(record.denoise + record.decode + (record.other or 0.0) for record in clip.records)
    )


# ---- memory ----


class MemoryWatch:
    """Memory that something takes from the moment this is made: PyTorch's tensors, and the whole process or device."""

    def __init__(self, device: str) -> None:
        self._device = device
        release()
        if device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
            self._allocated = torch.cuda.memory_allocated()
        self._before = self._used()
        self._peak = self._before

    def _used(self) -> int:
        if self._device == "cuda":
            import torch

            free, total = torch.cuda.mem_get_info()
            return total - free
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return 1024 * int(line.split()[1])
        return 0

    @contextmanager
    def sampling(self, period: Seconds = 0.02) -> Iterator[None]:
        """Look at the total again and again while the body runs."""
        stop = threading.Event()

        def sample() -> None:
            while True:
                self._peak = max(self._peak, self._used())
                if stop.wait(period):
                    return

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def peaks(self) -> dict[str, int | None]:
        """Bytes above the start: `torch_bytes` of PyTorch's allocator (None on a CPU), `total_bytes` as the driver
        counts the device's memory in use, on a CPU the resident memory of the process.
        """
        allocated = None
        if self._device == "cuda":
            import torch

            allocated = torch.cuda.max_memory_allocated() - self._allocated
        return {"torch_bytes": allocated, "total_bytes": self._peak - self._before}


def release() -> None:
    """Collect garbage and give cached device memory back."""
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---- what a chunk consists of ----

_SYNCS = frozenset(("Stream Sync", "Event Sync", "Context Sync"))
"""The profiler's names of what makes the host wait, whichever of CUDA's interfaces it came through."""
HOST_GAP_US = 20.0
"""The device is idle between two kernels anyway, for a microsecond or so. A longer gap is one that the host left."""
MARK = "lightforcing measured chunk"
"""Name of the stretch of time in a profiler's trace that `inspect_trace` looks at."""


@dataclass(frozen=True)
class Inspection:
    """One chunk under the profiler.

    Attributes:
        chunk: its index.
        shares: class -> fraction of all kernel time.
        parts: part of a forward (`benchmarks.kernel_classes.PARTS`) -> fraction; None where there is no bundle.
        kernels: launches.
        host_syncs: calls by which the host waited for the device, by kind; None on a CPU.
        idle_percent: of the chunk's time in which nothing ran on the device; None on a CPU.
        host_gap_percent: the same, gaps of at least `HOST_GAP_US` only: the time that the host cost.
        largest: the kernels that took most, with their share.
        note: why something is missing.
    """

    chunk: int
    shares: dict[str, float] | None = None
    parts: dict[str, float] | None = None
    kernels: int | None = None
    host_syncs: dict[str, int] | None = None
    idle_percent: float | None = None
    host_gap_percent: float | None = None
    largest: dict[str, float] = field(default_factory=dict)
    note: str = ""


def inspected_clip(runner: Runner, chunks: int, device: str, *, in_torch: bool) -> Inspection:
    """Generate a clip with its last but one chunk under the profiler: with overlap, the next one runs beside it.

    Args:
        in_torch: whether the rung's work is visible to PyTorch's profiler on a CPU.
    """
    chosen = max(0, chunks - 2)
    if device == "cpu" and not in_torch:
        for _ in runner.clip(chunks):
            pass
        return Inspection(chosen, note="the engine's kernels are not visible to the profiler on a CPU")
    profiler = profiled_chunk(runner.clip(chunks), chosen, device)
    if device == "cpu":
        return _inspect_operators(profiler.key_averages(), chosen)
    return inspect_trace(trace_events(profiler), chosen)


def profiled_chunk(clip: Iterator[ChunkRecord], chosen: int, device: str) -> Any:
    """Generate a whole clip; the profile of its chunk `chosen`, which is marked, for `inspect_trace`."""
    from torch._C._profiler import _ExperimentalConfig
    from torch.profiler import ProfilerActivity, profile, record_function

    # Between the clips of one rung and the graphs of the next, CUDA's profiler stays: starting it anew beside graphs
    # that were instantiated under it has crashed (torch/profiler/profiler.py).
    os.environ |= {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}
    config = _ExperimentalConfig(enable_cuda_sync_events=True)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    for _ in range(chosen):
        next(clip)
    with profile(activities=activities, experimental_config=config) as profiler:
        with record_function(MARK):
            next(clip)
        _synchronize()  # or what is still running has no end in the trace
    for _ in clip:
        pass
    return profiler


def trace_events(profiler: Any) -> list[dict[str, Any]]:
    """The events of a profile, as Chrome's trace format has them."""
    with tempfile.TemporaryDirectory(dir=temporary_folder()) as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def _shares(times: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    total = sum(times.values()) or 1.0
    classes: defaultdict[str, float] = defaultdict(float)
    for name, spent in times.items():
        classes[classify(name)] += spent
    largest = {
        _shortened(name): spent / total for name, spent in nlargest(12, times.items(), key=itemgetter(1))
    }
    return {kind: classes[kind] / total for kind in CLASSES}, largest


def _shortened(name: str) -> str:
    """Both ends of a name: kernels of one package may differ only in the last letters."""
    return name if len(name) <= 100 else f"{name[:60]}...{name[-37:]}"


def _inspect_operators(averages: Iterable[Any], chunk: int) -> Inspection:
    times: defaultdict[str, float] = defaultdict(float)
    calls = 0
    for event in averages:
        if event.key != MARK:
            times[event.key] += event.self_cpu_time_total
            calls += event.count
    shares, largest = _shares(times)
    return Inspection(
        chunk, shares, kernels=calls, largest=largest, note="classes of PyTorch operators, by their own time"
    )


def inspect_trace(events: Sequence[Mapping[str, Any]], chunk: int) -> Inspection:
    """What a trace of PyTorch's profiler says about the marked stretch of time."""
    marked = [e for e in events if e.get("name") == MARK and e.get("cat") == "user_annotation"]
    if not marked:
        return Inspection(chunk, note="the profiler's trace has no mark")
    start = float(marked[0]["ts"])
    end = start + float(marked[0]["dur"])
    times: defaultdict[str, float] = defaultdict(float)
    syncs: Counter[str] = Counter()
    inside = [event for event in events if start <= float(event.get("ts", -1)) < end]
    for event in inside:
        if event.get("cat") == "cuda_sync" and event.get("name") in _SYNCS:
            syncs[str(event["name"])] += 1
    on_gpu = gpu_events(inside)
    for run in on_gpu:
        times[run.name] += run.duration
    gaps = _gaps(((run.start, run.start + run.duration) for run in on_gpu), start, end)
    idle, host = (
        100 * sum(gap for gap in gaps if gap >= least) / (end - start) for least in (0.0, HOST_GAP_US)
    )
    shares, largest = _shares(times)
    # A forward that the stretch cuts is told apart by what lies outside, which takes no time here.
    parts = part_shares(
        run if start <= run.start < end else replace(run, duration=0.0) for run in gpu_events(events)
    )
    return Inspection(chunk, shares, parts, len(on_gpu), dict(syncs), idle, host, largest)


def _gaps(spans: Iterable[tuple[float, float]], start: float, end: float) -> list[float]:
    """Stretches between `start` and `end` that no span covers."""
    gaps, reached = [], start
    for first, last in sorted(spans):
        if first > reached:
            gaps.append(first - reached)
        reached = max(reached, last)
    return [*gaps, max(0.0, end - reached)]
