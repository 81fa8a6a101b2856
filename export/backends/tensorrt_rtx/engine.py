"""Building TensorRT-RTX engines, for any of its GPUs, on any machine.

Each engine is built in a process of its own (`rtx_worker`): the parser can abort the process it runs in, memory
returns to the system, and the file does not depend on what was built before it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from export.errors import BuildError, InputError
from export.graph.components import precisions_of
from export.graph.rewrites import prepare_for_rtx
from export.parts.worker import ended_by, run_worker, was_killed
from export.progress import StepCallback
from export.quantize.graph import quantized_products
from export.request.capability import BACKENDS, known_capabilities
from export.units import readable_size
from runtime.bundle import Dtype, dtypes_by
from runtime.host_memory import memory

from .engine_text import EngineReport, check_products, read_engine

__all__ = ["EngineInfo", "EngineTensor", "build_engine", "check_request"]

_BACKEND = BACKENDS["tensorrt-rtx"]

_MEMORY_FACTOR, _MEMORY_BASE = 3, 640 << 20
"""Memory of a build: so many times the weights inside the engine, and the library itself (measured)."""

_DISK_FACTOR, _DISK_BASE = 2.2, 64 << 20
"""Disk: the engine holds the weights, some of them twice, and the kernels."""


@dataclass(frozen=True)
class EngineTensor:
    """An input or output of an engine, as its network declares it."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class EngineInfo:
    """An engine that was built, and what the build took.

    Attributes:
        seconds: of parsing and building, without the start of the process.
        peak_bytes: largest memory of the process that built it.
        version: of TensorRT-RTX; the engine runs with this one only.
        report: what the engine says about itself.
    """

    path: Path
    compute_capability: str
    inputs: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    engine_bytes: int
    seconds: float
    peak_bytes: int
    version: str
    report: EngineReport


def check_request(compute_capability: str, *precisions: str) -> str:
    """Check that TensorRT-RTX is installed and builds `precisions` for `compute_capability` ("12.0").

    Returns:
        its version.

    Raises:
        InputError: it does not build that; names what it builds.
        BuildError: it is not installed, or not in the version this project reads the engines of.
    """
    library, capabilities = _BACKEND.library, _BACKEND.capabilities
    assert library is not None and capabilities is not None
    if compute_capability not in capabilities:
        raise InputError(
            f"TensorRT-RTX builds for compute capability {', '.join(known_capabilities(_BACKEND))}, and not for "
            f"{compute_capability}; use --backend tensorrt or --backend inductor on such a GPU"
        )
    for precision in precisions:
        if not _BACKEND.computes(precision, compute_capability):
            able = " or ".join(p for p in _BACKEND.precisions[:2] if _BACKEND.computes(p, compute_capability))
            other = f"--precision {able}, or another --gpu" if able else "another --gpu"
            raise InputError(
                f"GPUs of compute capability {compute_capability} do not compute in {precision}, which begins with "
                f"{_BACKEND.minimum[precision]}; use {other}"
            )
    version = library.version
    if version is None:
        raise BuildError(
            f"TensorRT-RTX is not installed; pip install '{library.requirement}' (the extra tensorrt-rtx)"
        )
    if not library.supports(version):
        release = ".".join(map(str, library.release))
        raise BuildError(
            f"TensorRT-RTX {version} is installed, and this version builds with {release}; pip install "
            f"'{library.requirement}'"
        )
    return version


def build_engine(
    onnx_path: Path,
    engine_path: Path,
    *,
    component: str,
    compute_capability: str,
    progress: StepCallback | None = None,
    check: Callable[[EngineReport], None] | None = None,
) -> EngineInfo:
    """Build the graph at `onnx_path` for one compute capability, and write the engine to `engine_path`.

    The graph is adapted first (`prepare_for_rtx`): boundary tensors `[1, T, N]` become `[T, N]` and bias inputs
    `[N]` become `[1, N]`, so take shapes from the result. The file appears when it is complete and checked.

    Args:
        component: its name, for messages.
        check: called with the engine's own description; what it raises stops the build and leaves no file.

    Raises:
        InputError: the GPU does not compute in a type of the graph, or TensorRT-RTX does not build for it.
        BuildError: not enough memory or disk, TensorRT-RTX refuses the graph, or a quantized linear did not become a
            product of its type; names the nodes.
        ExportError: the graph still holds operators of this project.
        EngineFormatError: the engine cannot be read.
    """
    model = ir.load(onnx_path)
    check_request(compute_capability, *precisions_of(model) - {"fp32"})
    _check_static(model, component)
    products = quantized_products(model)
    prepare_for_rtx(model)
    _check_room(model, engine_path, component)
    # Names of this process's own: the worker of a build that was killed may still be at its last engine.
    prepared = onnx_path.with_name(
        f".{onnx_path.stem}.{os.getpid()}.onnx"
    )  # beside its weights, which it refers to
    unchecked = engine_path.with_name(f".{engine_path.name}.{os.getpid()}")
    request = {
        "onnx": str(prepared),
        "engine": str(unchecked),
        "compute_capability": compute_capability,
    }
    try:
        _number_scoped(model.graph)
        ir.save(model, prepared)
        result = _run_worker(request, component, progress)
        report = read_engine(unchecked)
        check_products(component, report, products)
        if check is not None:
            check(report)
        os.replace(unchecked, engine_path)
    finally:
        for path in (prepared, unchecked):
            path.unlink(missing_ok=True)
    types = dtypes_by("tensorrt")
    return EngineInfo(
        path=engine_path,
        compute_capability=compute_capability,
        inputs=tuple(EngineTensor(n, types[t], tuple(s)) for n, t, s in result["inputs"]),
        outputs=tuple(EngineTensor(n, types[t], tuple(s)) for n, t, s in result["outputs"]),
        engine_bytes=engine_path.stat().st_size,
        seconds=result["seconds"],
        peak_bytes=result["peak_bytes"],
        version=result["version"],
        report=report,
    )


def _number_scoped(graph: ir.Graph) -> None:
    """Name nodes that are named after their modules by numbers instead.

    Nothing reads those names in an engine. With them, TensorRT-RTX 1.7 now and then made two engines of one graph,
    and an interrupted build has to end in the bytes of one that was not.
    """
    for index, node in enumerate(graph):
        if node.name is not None and node.name.startswith("/"):
            node.name = f"{node.op_type}_{index}"


def _check_static(model: ir.Model, component: str) -> None:
    for value in model.graph.inputs:
        dims = None if value.shape is None else tuple(value.shape)
        if dims is None or any(not isinstance(dim, int) for dim in dims):
            raise BuildError(
                f"{component}: the input {value.name!r} has the shape {dims}; an engine is built for fixed sizes: "
                "export this component with none left open"
            )


def _check_room(model: ir.Model, engine_path: Path, component: str) -> None:
    """Refuse a build that cannot fit, before it begins."""
    constants = (value.const_value for value in model.graph.initializers.values())
    weights = sum(constant.nbytes for constant in constants if constant is not None)
    needed, free = _MEMORY_FACTOR * weights + _MEMORY_BASE, memory().available
    if free is not None and free < needed:
        raise BuildError(
            f"{component}: building it takes about {readable_size(needed)} of memory (its weights are "
            f"{readable_size(weights)}) and {readable_size(free)} are free; close other programs, use a machine "
            "with more, or pass the weights as inputs"
        )
    needed, room = int(_DISK_FACTOR * weights) + _DISK_BASE, shutil.disk_usage(engine_path.parent).free
    if room < needed:
        raise BuildError(
            f"{component}: its engine takes up to {readable_size(needed)} and {engine_path.parent} has "
            f"{readable_size(room)} free; make room or choose another --out"
        )


# ---- the parent of the process that builds ----


def _run_worker(request: dict[str, Any], component: str, progress: StepCallback | None) -> dict[str, Any]:
    outcome = run_worker("export.backends.tensorrt_rtx.worker", request, os.environ, progress)
    if outcome.code == 0 and "seconds" in outcome.result:
        return outcome.result
    raise BuildError(_failure(component, request, outcome.result, outcome.code, outcome.log))


def _failure(component: str, request: dict[str, Any], result: dict[str, Any], code: int, log: str) -> str:
    """What went wrong, in words."""
    gpu = request["compute_capability"]
    lines = [line for line in (*result.get("errors", ()), *log.splitlines()) if line.strip()]
    said = "; ".join(lines[-4:])[-1500:] or "it gives no reason"
    text = " ".join(lines).lower()
    starved = ("bad_alloc", "out of memory", "outofmemory", "cannot allocate", "memoryerror", "alloc_failed")
    if was_killed(code) or any(word in text for word in starved):
        return (
            f"{component}: the build ran out of memory (the system ended it); close other programs, use a machine with "
            f"more memory, or pass the weights as inputs. TensorRT-RTX says: {said}"
        )
    if result.get("stage") == "parse":
        return (
            f"{component}: TensorRT-RTX cannot read the graph: {said}. Express the node in operators it knows, or cut "
            "the graph there"
        )
    if (by := ended_by(code)) is not None:
        return (
            f"{component}: TensorRT-RTX ended the process that built it ({by}); it says: {said}. The other components "
            "are not affected"
        )
    if code and "stage" not in result:
        return f"{component}: TensorRT-RTX does not start on this machine: {said}. Install it again"
    return (
        f"{component}: TensorRT-RTX does not build it for compute capability {gpu}: {said}. A node without an "
        "implementation is one whose types or shapes that GPU has no kernel for: try --precision bf16"
    )
