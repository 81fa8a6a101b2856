"""Building TensorRT engines on the GPU that they are for, and measuring them there.

Each engine is built, and later run, in a process of its own (`worker`): memory returns to the system and the GPU,
and a crash of the library ends one engine and not the build.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from export.errors import BuildError, InputError
from export.machine import Gpu, find_gpus
from export.parts.run import BuiltEngine
from export.parts.worker import ended_by, run_worker, was_killed
from export.progress import StepCallback
from export.quantize.graph import quantized_products
from export.request.capability import BACKENDS
from runtime import bundle
from runtime.files import cache_folder

from .engine_text import check_plugins, check_precision, read_inspection
from .graph import operator_nodes, operators_of, prepare_for_trt

__all__ = ["TrtMachine", "TrtPlugin", "build_engine", "find_machine", "measure_engine"]

_BACKEND = BACKENDS["tensorrt"]

_WORKSPACE_SHARE = 0.5
"""Part of the GPU's memory that tactics may use while an engine is built."""


@dataclass(frozen=True)
class TrtPlugin:
    """The plugin library, by the hash that it is known by from here on."""

    path: Path
    sha256: str

    @classmethod
    def at(cls, path: Path) -> TrtPlugin:
        return cls(path.resolve(), bundle.hash_file(path))


@dataclass(frozen=True)
class TrtMachine:
    """Where engines are built.

    Attributes:
        ordinal: of the GPU, among those that the driver shows.
        version: of TensorRT.
        cache: folder of timing caches.
    """

    gpu: Gpu
    ordinal: int
    version: str
    cache: Path

    @property
    def timing_cache(self) -> Path:
        """The cache of kernel timings of this GPU model and this release; others' would not apply."""
        name = re.sub(r"[^a-z0-9]+", "-", self.gpu.name.lower()).strip("-")
        return self.cache / f"{name}-{self.gpu.compute_capability}-tensorrt-{self.version}.timings"

    @property
    def workspace_limit(self) -> int:
        """Bytes of GPU memory that a build may use as workspace."""
        return int(self.gpu.memory_bytes * _WORKSPACE_SHARE)

    def environment(self) -> dict[str, str]:
        """The environment of a process that sees this GPU only."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = [name for name in visible.split(",") if name]
        chosen = names[self.ordinal] if self.ordinal < len(names) else str(self.ordinal)
        return {**os.environ, "CUDA_VISIBLE_DEVICES": chosen}


def find_machine(target_name: str, compute_capability: str | None, precision: str) -> TrtMachine:
    """The GPU and the TensorRT that build for a target; asked before any long work.

    Raises:
        InputError: the target's GPU is not in this machine, or does not compute in the precision.
        BuildError: TensorRT is not installed, or in another major release.
    """
    if compute_capability is None:
        raise InputError(f"{target_name} is no GPU; use --backend onnxruntime")
    major, minor = (int(part) for part in compute_capability.split("."))
    if not _BACKEND.computes(precision, compute_capability):
        raise InputError(
            f"GPUs of compute capability {compute_capability} do not compute in {precision}, which begins with "
            f"{_BACKEND.minimum[precision]}; use another --precision or another --gpu"
        )
    report = find_gpus()
    found = [(i, gpu) for i, gpu in enumerate(report.gpus) if gpu.compute_capability == compute_capability]
    if not found:
        here = ", ".join(f"{g.name} ({g.compute_capability})" for g in report.gpus) or report.problem
        other = (
            "--backend tensorrt-rtx builds on any machine"
            if (major, minor) >= (12, 0)
            else ("--backend onnxruntime builds on any machine")
        )
        raise InputError(
            f"TensorRT builds an engine on the very GPU that runs it; {target_name} has compute capability "
            f"{compute_capability}, and here there is {here}. Run this command on a machine with that GPU; or {other}"
        )
    library = _BACKEND.library
    assert library is not None
    version = library.version
    if version is None or not library.supports(version):
        state = (
            "is not installed"
            if version is None
            else f"{version} is installed, which this version does not use"
        )
        raise BuildError(f"TensorRT {state}; pip install '{library.requirement}' (the extra tensorrt)")
    ordinal, gpu = found[0]
    return TrtMachine(gpu, ordinal, version, cache_folder("tensorrt"))


def build_engine(
    onnx_path: Path,
    engine_path: Path,
    *,
    component: str,
    machine: TrtMachine,
    plugin: TrtPlugin,
    dimensions: Mapping[str, int],
    progress: StepCallback | None = None,
) -> BuiltEngine:
    """Build the graph at `onnx_path` and write the engine to `engine_path`, with the inspector's output beside it.

    Args:
        component: its name, for messages.
        plugin: loaded only for graphs with operators of this project.
        dimensions: sizes of the graph's symbolic dimensions.

    Raises:
        BuildError: TensorRT refuses the graph, runs out of memory, or computes a quantized product in another type.
        ExportError: the graph has an open dimension.
    """
    model = ir.load(onnx_path)
    operators = operators_of(model)
    prepare_for_trt(model, dimensions)
    prepared = onnx_path.with_name(f".{onnx_path.stem}.trt.onnx")  # beside its weights, which it refers to
    inspector = engine_path.with_name(inspector_name(engine_path.name))
    machine.cache.mkdir(parents=True, exist_ok=True)
    request = {
        "task": "build",
        "onnx": str(prepared),
        "engine": str(engine_path),
        "inspector": str(inspector),
        "plugin": _plugin(plugin, operators),
        "timing_cache": str(machine.timing_cache),
        "workspace_limit": machine.workspace_limit,
    }
    try:
        ir.save(model, prepared)
        result = _run_worker(request, component, machine, progress)
        inspection = read_inspection(inspector)
        check_plugins(component, inspection, operator_nodes(model))
        check_precision(component, inspection, quantized_products(model))
    except BaseException:
        engine_path.unlink(missing_ok=True)
        raise
    finally:
        prepared.unlink(missing_ok=True)
    cost = bundle.Cost(
        launches=result["layers"],
        activation_bytes=result["activation_bytes"],
        gemms=inspection.products(),
        seconds=round(result["seconds"], 3),
        peak_bytes=result["peak_bytes"],
    )
    described = bundle.Component(
        file=engine_path.name, inputs=_specs(result["inputs"]), outputs=_specs(result["outputs"]), cost=cost
    )
    return BuiltEngine(described, result["version"])


def inspector_name(engine: str) -> str:
    """File name of the inspector's output of an engine file."""
    return f"{engine.removesuffix('.engine')}.inspector.json"


def measure_engine(
    folder: Path,
    name: str,
    component: bundle.Component,
    *,
    golden: str,
    machine: TrtMachine,
    plugin: TrtPlugin,
    operators: list[str],
) -> dict[str, float | None]:
    """Run the golden vectors of a component on its engine, on the GPU that it was built on.

    Returns:
        the error of every output of every case; None where it is not finite.

    Raises:
        BuildError: the engine does not load or run.
    """
    assert component.file is not None
    request = {
        "task": "measure",
        "folder": str(folder),
        "engine": str(folder / component.file),
        "name": name,
        "component": component.model_dump(mode="json"),
        "golden": golden,
        "plugin": _plugin(plugin, operators),
    }
    errors: dict[str, float | None] = _run_worker(request, name, machine, None)["errors"]
    return errors


def _plugin(plugin: TrtPlugin, operators: list[str]) -> dict[str, Any] | None:
    """What a process needs to load the plugin; None where the graph has no operators of this project."""
    return {"path": str(plugin.path), "sha256": plugin.sha256, "operators": operators} if operators else None


def _specs(tensors: list[tuple[str, str, list[int]]]) -> tuple[bundle.TensorSpec, ...]:
    types = bundle.dtypes_by("tensorrt")
    return tuple(
        bundle.TensorSpec(name=name, dtype=types[dtype], shape=tuple(shape)) for name, dtype, shape in tensors
    )


def _run_worker(
    request: dict[str, Any], component: str, machine: TrtMachine, progress: StepCallback | None
) -> dict[str, Any]:
    outcome = run_worker("export.backends.tensorrt.worker", request, machine.environment(), progress)
    if outcome.code == 0:
        return outcome.result
    raise BuildError(failure(component, str(outcome.result.get("stage", "start")), outcome.code, outcome.log))


_LOG_LINES, _LOG_CHARACTERS = 4, 1500
_OUT_OF_GPU_MEMORY = ("out of memory", "outofmemory", "cudaerrormemoryallocation", "insufficient memory")
_OUT_OF_HOST_MEMORY = ("bad_alloc", "cannot allocate memory", "memoryerror")
_STAGES = {
    "start": "TensorRT does not start on this machine",
    "plugin": "the plugin library does not load",
    "parse": "TensorRT cannot read the graph",
    "build": "TensorRT does not build it",
    "inspect": "the engine does not load on the GPU that it was built on",
    "run": "the engine does not run on the GPU that it was built on",
}


def failure(component: str, stage: str, code: int, log: str) -> str:
    """What went wrong in a process, in words."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    said = "; ".join(lines[-_LOG_LINES:])[-_LOG_CHARACTERS:] or "it gives no reason"
    text = " ".join(lines).lower()
    if was_killed(code) or any(word in text for word in _OUT_OF_HOST_MEMORY):
        return (
            f"{component}: the build ran out of the machine's memory; close other programs, or use another machine. "
            f"TensorRT says: {said}"
        )
    if any(word in text for word in _OUT_OF_GPU_MEMORY):
        return (
            f"{component}: the build ran out of the GPU's memory; end other programs on the GPU, or build a lower "
            f"--resolution or a shorter --window. TensorRT says: {said}"
        )
    if (by := ended_by(code)) is not None:
        return f"{component}: TensorRT ended the process ({by}); it says: {said}"
    return f"{component}: {_STAGES[stage]}: {said}"
