"""Running single components of a bundle on the host, for verification."""

from __future__ import annotations

import platform as machine
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import PERSIST, Bundle
from runtime.bundle.dtypes import numpy_dtype
from runtime.bundle.golden import Arrays, Platform
from runtime.bundle.weights_file import WeightsFile
from runtime.program.attention import persist_launches, persist_work
from runtime.program.buffers import plan_buffers
from runtime.program.builder import build_program
from runtime.program.program import EngineRun, KernelLaunch

from .executor import HostExecutor
from .graph import load_graph
from .onnxruntime import default_threads
from .persistent import PERSISTENT_KERNELS

__all__ = ["HostRunner"]

Run = Callable[[Arrays], dict[str, NDArray[Any]]]

_CPU_INFO = Path("/proc/cpuinfo")
_LIBRARIES = {"onnxruntime": ("onnxruntime", "onnxruntime-gpu"), "inductor": ("torch",)}
"""Distributions that execute a backend's components, of which one is enough."""


_NAN_CODE = 0x7F


class HostRunner:
    """Implements `ComponentRunner`; holds one loaded component at a time.

    `step` and `clean` of a segmented bundle run as the forwards that the runtime makes of the segments. Components
    outside of the step take the weights that the manifest binds to them where they are given none.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        self._bundle = bundle
        self._threads = threads or default_threads()
        self._loaded: tuple[str, int, Run] | None = None  # component, slots, how to run it

    @property
    def platform(self) -> Platform:
        """The CPU's model, and the version of what executes the components."""
        libraries = {}
        for name in _LIBRARIES[self._bundle.manifest.backend]:
            try:
                libraries[name] = version(name)
            except PackageNotFoundError:
                continue
        return Platform(device=_cpu_name(), driver=None, libraries=libraries)

    def run(self, component: str, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """See `ComponentRunner.run`."""
        if component == PERSIST:
            return self._persist(inputs)
        is_cut = component in ("step", "clean") and self._bundle.component(component).file is None
        slots = max((len(value) for name, value in inputs.items() if name.startswith("past_")), default=1)
        if self._loaded is None or self._loaded[0] != component or (is_cut and self._loaded[1] < slots):
            self._loaded = None  # before the next one takes memory
            run = self._load_forwards(component, slots) if is_cut else self._load_graph(component)
            self._loaded = component, slots, run
        return self._loaded[2](inputs)

    def _persist(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """The kernels that update a persistent set, and the frames that it has then."""
        manifest, described = self._bundle.manifest, self._bundle.component(PERSIST)
        arrays = {name: value.copy() for name, value in inputs.items()}
        for name, (dtype, shape) in persist_work(manifest).items():
            arrays[name] = np.empty(shape, dtype=numpy_dtype(dtype))
        for step in persist_launches(manifest, "float32"):
            launch = KernelLaunch(step.kernel, step.problem, {}, step.options)
            PERSISTENT_KERNELS[step.kernel](arrays, launch=launch)
        first = manifest.cache.sink_frames
        slots = arrays["frame_slots"][first : first + manifest.persistent_frames]
        return {spec.name: arrays[spec.name.replace("kept_", "past_")][slots] for spec in described.outputs}

    def _load_graph(self, component: str) -> Run:
        graph = load_graph(self._bundle, component, self._threads)
        segments = self._bundle.manifest.segments
        bound = {} if segments is None else segments.outside.get(component, {})
        weights: Arrays = {}
        if segments and bound:
            with WeightsFile(self._bundle.opened(segments.weights)) as stored:
                weights = {name: stored.get_required(tensor) for name, tensor in bound.items()}
                stored.check()

        def run(inputs: Arrays) -> dict[str, NDArray[Any]]:
            outputs = {
                name: np.empty([int(dim) for dim in spec.shape], dtype=numpy_dtype(spec.dtype))
                for name, spec in graph.outputs.items()
            }
            graph.run(graph.bind({**weights, **inputs}, outputs))
            return outputs

        return run

    def _load_forwards(self, component: str, slots: int) -> Run:
        """The forwards of a program that compute `component`, over a pool of at least `slots` slots."""
        manifest = self._bundle.manifest
        sessions = -(-slots // max(1, manifest.held_frames))
        program = build_program(self._bundle, plan_buffers(manifest, sessions))
        kind = "clean" if component == "clean" else "denoise"
        forwards = {name: f for name, f in program.forwards.items() if name.partition(".")[0] == kind}
        executor = HostExecutor(self._bundle, replace(program, forwards=forwards), threads=self._threads)
        specs = manifest.components[component]

        def run(inputs: Arrays) -> dict[str, NDArray[Any]]:
            forward = kind if component == "clean" else f"{kind}.{int(inputs['step'])}"
            views = {name: placed.view for name, placed in program.buffers.items()}
            for operation in forwards[forward].operations:
                if isinstance(operation, EngineRun):
                    views |= operation.tensors  # latents and noise lie in other places in every forward
            outputs = {spec.name: executor.array(views[spec.name]) for spec in specs.outputs}
            for array in outputs.values():
                # Not a number, in codes of E4M3 too, or what an earlier run wrote would pass for this one's.
                array.fill(_NAN_CODE if array.dtype == np.uint8 else np.nan)
            for spec in specs.inputs:
                value = inputs[spec.name]
                executor.array(views[spec.name])[tuple(slice(size) for size in value.shape)] = value
            executor.run(0, forward)
            return {name: array.copy() for name, array in outputs.items()}

        return run


def _cpu_name() -> str:
    try:
        for line in _CPU_INFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return machine.processor() or machine.machine()
