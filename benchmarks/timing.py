# mypy: allow-untyped-calls, no-warn-return-any
"""Device time of GPU work, and what to record about the machine."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["Work", "machine_facts", "microseconds", "write_json"]

Work = Callable[[], Any]


def microseconds(works: Sequence[Work], *, repeats: int = 20, target_us: float = 3000.0) -> float:
    """Median device time of one work item, in microseconds.

    The items do the same work on different buffers and run in turn, so that none finds its inputs in a cache. They
    are captured in one CUDA graph, long enough to hide the launch of the graph; work that cannot be captured is timed
    launch by launch.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        once = _events(lambda: [work() for work in works], 3) / len(works)
    rounds = max(1, int(target_us / (once * len(works))))

    def everything() -> None:
        for _ in range(rounds):
            for work in works:
                work()

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=side):
            everything()
        run: Work = graph.replay
    except RuntimeError:
        torch.cuda.synchronize()
        run = everything
    with torch.cuda.stream(side):
        return _events(run, repeats) / (rounds * len(works))


def _events(run: Work, repeats: int) -> float:
    """Median time of `run` in microseconds."""
    run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return statistics.median(times)


def machine_facts() -> dict[str, str]:
    """Device, driver and library versions, and the date."""
    facts = {"date": datetime.now(UTC).date().isoformat(), "python": platform.python_version()}
    for package in ("torch", "triton", "cuda-core", "flash-attn"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    if not torch.cuda.is_available():
        return {**facts, "device": f"{os.cpu_count()}-core CPU"}
    properties = torch.cuda.get_device_properties(0)
    facts["device"] = properties.name
    facts["compute_capability"] = f"{properties.major}.{properties.minor}"
    facts["multiprocessors"] = str(properties.multi_processor_count)
    facts["cuda"] = str(torch.version.cuda)
    facts["driver"] = _driver()
    return facts


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def write_json(path: Path, content: Any) -> None:
    """Write a result file, or write it anew; it is complete at every moment."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
