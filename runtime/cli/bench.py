"""`python -m runtime bench`: frames per second, and where the time goes."""

from __future__ import annotations

import argparse
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from runtime.bundle.benchmark import Benchmark, MeasuredBundle, MeasuredChunk
from runtime.errors import InputError
from runtime.files import atomic_output
from runtime.pipeline import Pipeline
from runtime.scheduler import ChunkTimes
from runtime.session import Session
from runtime.terminal import console, write_out

from .generate import load_options, read_prompt

__all__ = ["measure", "run_bench"]


def measure(
    pipeline: Pipeline, prompt: dict[str, Any], *, chunks: int, warmup_chunks: int, sessions: int, seed: int
) -> Benchmark:
    """Run `sessions` rollouts at once and measure `chunks` chunks of each, after `warmup_chunks`."""
    for name, value, least in (("chunks", chunks, 1), ("warmup-chunks", warmup_chunks, 0)):
        if value < least:
            raise InputError(f"--{name} is {value}; expected {least} or more")
    with ExitStack() as stack, ThreadPoolExecutor(max_workers=sessions) as pool:
        opened = [
            stack.enter_context(pipeline.session(seed=seed + number, **prompt)) for number in range(sessions)
        ]
        if warmup_chunks:
            list(pool.map(lambda session: _drain(session, warmup_chunks), opened))
        before = _counters(pipeline)
        start = time.perf_counter()
        lists = list(pool.map(lambda session: _drain(session, chunks), opened))
        seconds = time.perf_counter() - start
        counted = {name: value - before[name] for name, value in _counters(pipeline).items()}
    times = [times for per_session in lists for times in per_session]
    frames = sum(item.frames for item in times)
    other = sum(item.other for item in times)
    return Benchmark(
        bundle=MeasuredBundle.of(pipeline.manifest),
        sessions=sessions,
        frames=frames,
        seconds=seconds,
        fps=frames / seconds,
        denoise_per_chunk=mean(item.denoise for item in times),
        decode_per_chunk=mean(item.decode for item in times),
        other_per_chunk=mean(item.other for item in times),
        median_latency=median(item.latency for item in times),
        overhead_percent=100 * other / sum(item.denoise + item.decode + item.other for item in times),
        per_chunk={name: value / len(times) for name, value in counted.items()},
        chunks=tuple(MeasuredChunk(**asdict(item)) for item in times),
        environment=_environment(pipeline),
    )


def run_bench(options: argparse.Namespace, notes: Console, written: list[str]) -> None:
    """Measure, print a table, and write JSON where asked to; `written` gets the file's name once it is there."""
    to_stdout = options.json == "-"
    target = None if options.json is None or to_stdout else Path(options.json)
    if target is not None and not target.parent.is_dir():
        raise InputError(f"folder {str(target.parent)!r} of --json does not exist; create it first")
    prompt = read_prompt(options)
    with (
        notes.status("loading") as status,
        Pipeline.load(
            options.bundle,
            sessions=options.sessions,
            **load_options(options),
            golden_progress=lambda case, done, total: status.update(
                f"verifying {case}, {done} of {total} done"
            ),
        ) as pipeline,
    ):
        status.update("measuring")
        result = measure(
            pipeline,
            prompt,
            chunks=options.chunks,
            warmup_chunks=options.warmup_chunks,
            sessions=options.sessions,
            seed=options.seed,
        )
    text = result.model_dump_json(indent=1) + "\n"
    if target is not None:
        with atomic_output(target) as temporary:
            temporary.write_text(text, encoding="utf-8")
        written.append(options.json)
    if to_stdout:
        write_out(text)
    else:
        console().print(_table(result))


def _drain(session: Session, chunks: int) -> list[ChunkTimes]:
    return [ChunkTimes.of(chunk) for chunk in session.stream(chunks=chunks)]


def _counters(pipeline: Pipeline) -> dict[str, int]:
    counters = getattr(getattr(pipeline.engine, "executor", None), "counters", None)
    return {} if counters is None else asdict(counters)


def _environment(pipeline: Pipeline) -> dict[str, Any]:
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "numpy": version("numpy"),
    }
    library = pipeline.manifest.library
    if library is not None:
        environment[library.name] = library.version
    if pipeline.manifest.backend == "onnxruntime":
        # Not asked by distribution name: several distributions provide this module.
        import onnxruntime

        environment["onnxruntime"] = onnxruntime.__version__
    if pipeline.engine.on_device:
        environment["device"] = pipeline.engine.component_runner().platform.device
    return environment


def _table(result: Benchmark) -> Table:
    title = escape(f"{result.bundle.name}, {result.sessions} session(s)")
    table = Table(title=title, show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("frames", f"{result.frames} in {result.seconds:.2f} s")
    table.add_row("FPS", f"{result.fps:.2f}")
    for name in ("denoise", "decode", "other"):
        table.add_row(f"{name} per chunk", f"{1000 * getattr(result, f'{name}_per_chunk'):.2f} ms")
    table.add_row("median latency", f"{1000 * result.median_latency:.2f} ms")
    table.add_row("time outside the engines", f"{result.overhead_percent:.2f} %")
    for name, value in result.per_chunk.items():
        table.add_row(f"{name.replace('_', ' ')} per chunk", f"{value:.1f}")
    return table
