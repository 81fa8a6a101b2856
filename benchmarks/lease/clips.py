"""Clips of one bundle through the runtime's public API, then one chunk under the profiler, kernel by kernel.

`python -m benchmarks.lease.clips BUNDLE --out FOLDER` writes `clips.json` anew after each step.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.timing import machine_facts, write_json

if TYPE_CHECKING:
    from benchmarks.rollout.bundles import BundleRollout

REPEATS = 3
_FILL = "Memset"
"""How the profiler's names of fills begin."""


def kernel_table(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What ran on the device in a profiler's trace: launches and microseconds by name, gaps by what they follow.

    Fills of memory (`fills`) are counted by the kernel that they come before, which is whose they are.
    """
    spans = sorted(
        (float(event["ts"]), float(event["dur"]), str(event["name"]))
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    )
    totals: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    gaps: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    fills: Counter[str] = Counter()
    filled = 0
    reached, last = None, ""
    for start, duration, name in spans:
        totals[name][0] += 1
        totals[name][1] += duration
        if name.startswith(_FILL):
            filled += 1
        else:
            fills[name] += filled
            filled = 0
        if reached is not None and start > reached:
            gaps[last][0] += 1
            gaps[last][1] += start - reached
        if reached is None or start + duration > reached:
            reached, last = start + duration, name

    def table(counted: Mapping[str, list[float]], most: int) -> list[dict[str, Any]]:
        ordered = sorted(counted.items(), key=lambda item: -item[1][1])[:most]
        return [{"name": name[:160], "count": count, "us": round(us, 1)} for name, (count, us) in ordered]

    wall = (reached or 0.0) - spans[0][0] if spans else 0.0
    busy = sum(us for _, us in totals.values())
    summary = {"launches": len(spans), "wall_us": round(wall, 1), "summed_us": round(busy, 1)}
    own = [{"name": name[:160], "count": count} for name, count in fills.most_common(12) if count]
    return {**summary, "kernels": table(totals, 80), "gaps": table(gaps, 12), "fills": own}


def _chunk(runner: BundleRollout, chunks: int, *, overlap: bool) -> dict[str, Any]:
    """The last but one chunk of a clip under the profiler; without `overlap` nothing runs beside it."""
    from benchmarks.rollout.measure import inspect_trace, profiled_chunk, trace_events

    events = trace_events(profiled_chunk(runner.clip(chunks, overlap=overlap), chunks - 2, "cuda"))
    return {"inspection": asdict(inspect_trace(events, chunks - 2)), **kernel_table(events)}


def main() -> int:
    """Measure; the exit code tells whether the clips were generated."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lease.clips", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    args = parser.parse_args()

    import torch

    from benchmarks.rollout.bundles import BundleRollout
    from benchmarks.rollout.ladder import LADDER, chunks_for
    from benchmarks.rollout.measure import MemoryWatch, summarise, timed_clip

    device = "cuda" if torch.cuda.is_available() else "cpu"
    result: dict[str, Any] = {"bundle": args.bundle.name, "machine": machine_facts()}

    def keep(name: str, measure: Callable[[], Any]) -> None:
        try:
            result[name] = measure()
        except Exception as error:  # a profiler that fails must not cost the clips that were timed
            lines = str(error).splitlines() or [""]
            result[name] = {"problem": f"{type(error).__name__}: {' / '.join(lines)[:1500]}"}
        write_json(args.out / "clips.json", result)
        print(f"{name}: done", flush=True)

    watch = MemoryWatch(device)
    start = time.perf_counter()
    runner = BundleRollout(args.bundle, LADDER[-1])
    result["load_s"] = time.perf_counter() - start
    print(f"loaded in {result['load_s']:.1f} s", flush=True)
    chunks = chunks_for(args.frames)
    try:
        with watch.sampling():
            first = timed_clip(runner, chunks)  # the runtime records its graphs while this one runs
        result["first_clip_s"], result["memory"] = first.seconds, watch.peaks()
        clips = []
        for _ in range(REPEATS):
            clips.append(timed_clip(runner, chunks))
            keep("clips", lambda: summarise(clips))
        if device == "cuda":
            keep("chunk alone", lambda: _chunk(runner, chunks, overlap=False))
            keep("chunk beside decoding", lambda: _chunk(runner, chunks, overlap=True))
    finally:
        runner.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
