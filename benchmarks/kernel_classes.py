"""What a kernel does, by the name under which a profiler shows it, and which part of a forward it belongs to.

Inductor names a kernel after every operator that was fused into it, the products and attention calls that read its
result included; so `triton_red_fused__scaled_mm_..._gelu_...` is no product. Whether such a kernel computes anything
is told by whether all its operators only move data.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["CLASSES", "PARTS", "GpuEvent", "classify", "gpu_events", "part_shares"]

OTHER: Final = "norm/elementwise"

_MOVEMENTS: Final = (
    *("_to_copy", "_unsafe_index", "_unsafe_view", "as_strided", "cat", "clone", "constant_pad_nd", "copy", "copy_"),
    *("expand", "flatten", "full", "index", "index_select", "narrow", "new_zeros", "permute", "repeat", "reshape"),
    *("select", "slice", "split", "split_with_sizes", "squeeze", "stack", "t", "transpose", "unbind", "unfold"),
    *("unsqueeze", "upsample_nearest2d", "view"),
)  # fmt: skip
"""Operators that only move or fill data, casts included, as Inductor writes them into names."""
_MOVES: Final = re.compile(rf"(_({'|'.join(sorted(_MOVEMENTS, key=len, reverse=True))}))+_\d+")
_INDUCTOR: Final = re.compile(r"triton_(?P<kind>[a-z]+)_fused(?P<operators>\w*)")

_SELECTS: Final = "score|select|expand|mean_key|resemble|pool|choose|weigh"
"""How names of this project's kernels begin that decide what attention sees."""
_ATTENDS: Final = "attend|sum_linear|project_linear|add_linear"
"""The same of those that attend."""

_RULES: Final = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        # This project's own, whose names are short.
        ("attention", rf"^_?({_ATTENDS}|sparse_attention)(_|$)"),
        ("selection", rf"^({_SELECTS})(_|$)"),
        ("copy", r"^(commit|rope_sink|persist)(_|$)"),
        (OTHER, r"^prepare(_|$)"),
        # Libraries. A class comes before those whose words its names may hold, too.
        ("copy", r"^(memcpy|memset)|direct_copy_kernel|_copy_kernel|catarray|upsample_nearest"),
        ("attention", r"flash|fmha|sdpa|\bmha_|softmax|scaled_dot_product|::attention"),
        (OTHER, r"::(native_)?(layer|batch|group)_norm"),
        ("selection", r"topk|(radix|bitonic|segmented|merge)sort|sortkv|::sort\b"),
        ("conv", r"fprop|dgrad|wgrad|convol|conv\dd|im2col|vol2col|winograd|n[cdhw]{3,4}to|tensorTransform"),
        ("gemm", r"nvjet|gemm|cublas|gemv|splitk|cutlass|::(add|b|baddb|_scaled_|_int_)?mm\b|matmul|::linear\b"),
        ("copy", r"::(copy_|cat|clone|contiguous|index_select|gather|scatter_?)$|gather|scatter|indexselect"),
    )
)  # fmt: skip

CLASSES: Final = ("selection", "attention", "conv", "gemm", "copy", OTHER)


def classify(kernel: str) -> str:
    """Class of a kernel (or, on a CPU, of a PyTorch operator) by its name: one of `CLASSES`."""
    if found := _INDUCTOR.match(kernel):
        return _of_inductor(found["kind"], found["operators"])
    return next((kind for kind, pattern in _RULES if pattern.search(kernel)), OTHER)


def _of_inductor(kind: str, operators: str) -> str:
    if kind == "tem":  # a template: the product, convolution or attention itself
        if "attention" in operators:
            return "attention"
        return "conv" if "convolution" in operators else "gemm"
    if _MOVES.fullmatch(operators):
        return "copy"
    return "attention" if "_softmax" in operators else OTHER


# ---- parts of a forward ----

PARTS: Final = ("first", "layer", "last", "operators", "decoder", "copies")
"""The packages of a segmented bundle; `operators` are the kernels between them; `copies` the runtime's own."""

_OPERATOR: Final = re.compile(rf"^(prepare|{_ATTENDS}|{_SELECTS})(_|$)")
_COPY: Final = re.compile(r"^(mem(cpy|set)\b|(commit|rope_sink|persist)(_|$))", re.IGNORECASE)
_PREPARE: Final = re.compile(r"^prepare(_|$)")


@dataclass(frozen=True)
class GpuEvent:
    """Something that ran on the device: microseconds, and the stream it ran on."""

    name: str
    start: float
    duration: float
    stream: int


def gpu_events(events: Iterable[Mapping[str, Any]]) -> list[GpuEvent]:
    """Kernels and copies of a trace of PyTorch's profiler, in the order in which they started."""
    found = [
        GpuEvent(
            str(event["name"]),
            float(event["ts"]),
            float(event["dur"]),
            int(event.get("args", {}).get("stream", 0)),
        )
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    return sorted(found, key=lambda event: event.start)


def part_shares(events: Iterable[GpuEvent]) -> dict[str, float] | None:
    """Share of the device's time that each of `PARTS` took; None where no bundle's kernels are among the events.

    A replayed graph shows no ranges, but the order of launches on a stream tells the parts apart. The operators'
    kernels stand between two packages. A forward is fed by copies, so what follows copies is `first`; where it follows
    `last` at once, it is known by its kernels. A stream without operators is the decoder's.
    """
    by_stream: defaultdict[int, list[GpuEvent]] = defaultdict(list)
    for event in events:
        by_stream[event.stream].append(event)
    times = dict.fromkeys(PARTS, 0.0)
    with_operators = {s for s, found in by_stream.items() if any(_PREPARE.match(e.name) for e in found)}
    if not with_operators:
        return None
    for stream, found in by_stream.items():
        if stream in with_operators:
            _forwards(found, times)
            continue
        for event in found:
            times["copies" if _COPY.match(event.name) else "decoder"] += event.duration
    total = sum(times.values()) or 1.0
    return {part: time / total for part, time in times.items()}


def _forwards(events: list[GpuEvent], times: dict[str, float]) -> None:
    """Add the times of one stream's events, which are those of forwards and of copies between them."""
    runs: list[
        tuple[bool, list[GpuEvent]]
    ] = []  # whether attention came before, and the events up to an operator
    run: list[GpuEvent] = []
    attended = False
    for event in events:
        if not _OPERATOR.match(event.name):
            run.append(event)
            continue
        times["operators"] += event.duration
        if run:
            runs.append((attended, run))
            run = []
        attended = not _PREPARE.match(event.name)
    end_of_stream = run
    fed = [run for attended, run in runs if not attended and _COPY.match(run[0].name)]
    firsts = {_names(run[_copies_before(run) :]) for run in fed} - {()}
    for attended, run in runs:
        start = next((n for n in range(len(run)) if _names(run[n:]) in firsts), len(run))
        times["first"] += _seconds(run[start:])
        if start == len(run):
            times["layer"] += _seconds(run)
        elif attended:
            _last(run[:start], times)
        else:
            times["copies"] += _seconds(run[:start])
    _last(end_of_stream, times)


def _last(events: list[GpuEvent], times: dict[str, float]) -> None:
    """Add what follows the last attention of a forward: a package, then copies."""
    end = len(events) - _copies_before(events[::-1])
    times["last"] += _seconds(events[:end])
    times["copies"] += _seconds(events[end:])


def _copies_before(events: list[GpuEvent]) -> int:
    """How many copies come first."""
    return next((n for n, event in enumerate(events) if not _COPY.match(event.name)), len(events))


def _names(events: list[GpuEvent]) -> tuple[str, ...]:
    return tuple(event.name for event in events)


def _seconds(events: Iterable[GpuEvent]) -> float:
    return sum(event.duration for event in events)
