"""The stages of a lease, as data: what each runs, how long it may, and what its figures decide.

Standard library only. A stage is a command in a process group of its own, so whatever happens in it costs only itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["CALLS", "Call", "Device", "Stage", "stages_of"]

Device = Literal["cuda", "cpu"]
Seconds = float
PYTHON = sys.executable
BUNDLE = "wan-1.3b-inductor-h200-fp8-512x768-short-light"
TINY_BUNDLE = "tiny-onnxruntime-cpu-fp32-128x128-short-light"


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        command: its arguments; `{results}` is the folder that it writes results to, `{build}` the one that holds
            kernels, bundles and wheels.
        limit: after which its whole process group is killed.
        background: it starts with the lease, on processor cores that are idle otherwise, and the others run beside it.
        after: background stages that it waits for, within `patience`.
        decides: what its figures are for.
    """

    name: str
    command: Sequence[str]
    limit: Seconds
    decides: str
    background: bool = False
    after: tuple[str, ...] = ()
    patience: Seconds = 0.0


@dataclass(frozen=True)
class Call:
    """One command on a machine that is lent: its stages and the seconds that they share."""

    name: str
    seconds: Seconds
    cuda: tuple[Stage, ...]
    cpu: tuple[Stage, ...]


def _pytest(chosen: str, *files: str) -> tuple[str, ...]:
    fixed = ("-q", "-m", "gpu", "-rs", "-p", "no:cacheprovider", "--junitxml={results}/tests.xml")
    return (PYTHON, "-m", "pytest", *fixed, *files, "-k", chosen)


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return (PYTHON, "-m", name, *arguments)


def _ladder(*arguments: str) -> tuple[str, ...]:
    return _module("benchmarks.rollout", "--bundles", "{build}/ladder", *arguments)


_CASE = ("--frames", "81", "--resolution", "512x768", "--flat-chunks", "0")

_FIRST_CUDA = (
    Stage(
        "bundle",
        _ladder(*_CASE, "--rungs", "6", "--build-only", "--budget-seconds", "400"),
        410,
        "whether packages that were compiled without a GPU are taken over; draws weights and golden vectors",
        background=True,
    ),
    Stage(
        "facts",
        _module("benchmarks.lease.facts", "--out", "{results}"),
        30,
        "the ceilings that every other figure is held against",
    ),
    Stage(
        "images",
        _pytest(
            "cuda.core and not torch.float16 and not sanitizer and not 1560",
            *(
                "tests/gpu/test_kernels_gpu.py",
                "tests/gpu/test_codes_gpu.py",
                "tests/gpu/test_methods_gpu.py",
            ),
        ),
        75,
        "whether the shipped kernels are right, against float64",
    ),
    Stage(
        "attention",
        _module(
            "benchmarks.attention",
            *("--candidates", "--images", "{build}/kernels", "--budget-seconds", "65", "--out", "{results}"),
        ),
        75,
        "which images are right, their times against dense attention; cost of select and prepare",
    ),
    Stage(
        "tiny",
        _pytest("not switch", "tests/gpu/test_inductor_gpu.py"),
        90,
        "golden vectors, rollouts against the reference, graphs and two sessions, in bf16 and fp8",
    ),
    Stage(
        "clips",
        _module("benchmarks.lease.clips", "{build}/ladder/" + BUNDLE, "--out", "{results}"),
        100,
        "frames per second of the finished runtime, where a chunk's time goes",
        after=("bundle",),
        patience=150,
    ),
    Stage(
        "golden",
        _module("runtime", "verify", "{build}/ladder/" + BUNDLE, "--json", "{results}/golden.json"),
        60,
        "whether every component of the 1.3B bundle computes what it should",
        after=("bundle",),
    ),
    Stage(
        "packages",
        _module("benchmarks.lease.packages", "{build}/ladder/" + BUNDLE, "--out", "{results}"),
        90,
        "time of each package alone; which one fails, and where",
        after=("bundle",),
    ),
    Stage(
        "eager",
        _ladder(*_CASE, "--rungs", "0", "--repeats", "1", "--budget-seconds", "75", "--out", "{results}"),
        80,
        "what plain PyTorch takes for the same clip",
    ),
)

_SECOND_CUDA = (
    Stage(
        "convolutions",
        _module("benchmarks.lease.convolutions", "--out", "{results}"),
        40,
        "which form of the decoder's convolutions the library does fastest",
    ),
    Stage(
        "windows",
        _module(
            "benchmarks.attention",
            *("--images", "{build}/kernels", "--flex", "one", "--blocks", "128", "--windows", "chunk 7,long"),
            *("--out", "{results}"),
        ),
        50,
        "attention at other windows and frame sizes, against FlexAttention",
    ),
    Stage(
        "just-in-time",
        _pytest("torch and bfloat16 and not sanitizer and not cuda.core", "tests/gpu/test_kernels_gpu.py"),
        60,
        "kernels compiled there against those that were shipped",
    ),
    Stage(
        "plugin",
        _pytest("not leak", "tests/gpu/test_plugin_gpu.py"),
        40,
        "the launch library and the plugin's enqueue through the driver",
    ),
    Stage(
        "memory",
        _pytest("(many_chunks or given_back) and inductor", "tests/gpu/test_executor_gpu.py"),
        40,
        "whether a long rollout and loading again take no more memory",
    ),
    Stage(
        "memcheck",
        _pytest("sanitizer and memcheck", "tests/gpu/test_kernels_gpu.py"),
        60,
        "reads and writes outside of buffers",
    ),
)

_THIRD_CUDA = (
    Stage(
        "native",
        _module("benchmarks.lease.native", "{build}/ladder/" + BUNDLE, "--out", "{results}"),
        170,
        "what timing chooses for kernels that were compiled by rule, and what that gains",
    ),
)

# The same stages where there is no GPU: a rehearsal of everything but the numbers.
_TINY = ("--device", "cpu", "--preset", "tiny", "--frames", "21", "--flat-chunks", "0")
_FIRST_CPU = (
    Stage(
        "bundle",
        _ladder(*_TINY, "--rungs", "6", "--build-only", "--budget-seconds", "600"),
        610,
        "that a bundle is built beside the other stages",
        background=True,
    ),
    Stage(
        "facts",
        _module("benchmarks.lease.facts", "--device", "cpu", "--out", "{results}"),
        60,
        "that facts are read and ceilings measured",
    ),
    Stage(
        "clips",
        _module(
            "benchmarks.lease.clips", "{build}/ladder/" + TINY_BUNDLE, "--out", "{results}", "--frames", "21"
        ),
        200,
        "that clips are timed",
        after=("bundle",),
        patience=600,
    ),
    Stage(
        "golden",
        _module("runtime", "verify", "{build}/ladder/" + TINY_BUNDLE, "--json", "{results}/golden.json"),
        120,
        "that golden vectors are run",
        after=("bundle",),
    ),
    Stage(
        "eager",
        _ladder(*_TINY, "--rungs", "0", "--repeats", "1", "--out", "{results}"),
        120,
        "that the ladder runs",
    ),
)

_SECOND_CPU = (
    Stage(
        "convolutions",
        _module(
            "benchmarks.lease.convolutions", "--device", "cpu", "--latent", "4", "4", "--out", "{results}"
        ),
        120,
        "that every form of every convolution gives the same result",
    ),
)

CALLS: dict[str, Call] = {
    "first": Call("first", 470, _FIRST_CUDA, _FIRST_CPU),
    "second": Call("second", 170, _SECOND_CUDA, _SECOND_CPU),
    "third": Call("third", 175, _THIRD_CUDA, ()),
}


def stages_of(call: Call, device: Device, names: Sequence[str] = ()) -> tuple[Stage, ...]:
    """The stages of a call on a device; only `names`, and the background stages that these wait for, where given.

    Raises:
        ValueError: a name is that of no stage.
    """
    stages = call.cuda if device == "cuda" else call.cpu
    known = {stage.name: stage for stage in stages}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"the {call.name} call has no stage {', '.join(unknown)} on {device}; it has {', '.join(known) or 'none'}"
        )
    if not names:
        return stages
    wanted = {*names, *(other for name in names for other in known[name].after)}
    return tuple(stage for stage in stages if stage.name in wanted)
