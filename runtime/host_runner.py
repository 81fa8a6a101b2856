"""Running single components of a bundle on the host, for verification."""

from __future__ import annotations

import platform as machine
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle
from .golden import Platform
from .host_engine import load_graph
from .onnxruntime_engine import default_threads
from .segmented import Graph
from .weights_file import numpy_dtype

__all__ = ["HostRunner"]

_CPU_INFO = Path("/proc/cpuinfo")
_LIBRARIES = {"onnxruntime": ("onnxruntime", "onnxruntime-gpu"), "inductor": ("torch",)}
"""Distributions that execute a backend's components, of which one is enough."""


class HostRunner:
    """Implements :class:`~runtime.golden.ComponentRunner`; holds one loaded component at a time."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        self._bundle = bundle
        self._threads = threads or default_threads()
        self._loaded: tuple[str, Graph] | None = None

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

    def run(self, component: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See :meth:`ComponentRunner.run <runtime.golden.ComponentRunner.run>`."""
        if self._loaded is None or self._loaded[0] != component:
            self._loaded = None  # before the next one takes memory
            self._loaded = component, load_graph(self._bundle, component, self._threads)
        graph = self._loaded[1]
        outputs = {
            name: np.empty([int(dim) for dim in spec.shape], dtype=numpy_dtype(spec.dtype))
            for name, spec in graph.outputs.items()
        }
        graph.run(graph.bind(inputs, outputs))
        return outputs


def _cpu_name() -> str:
    try:
        for line in _CPU_INFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return machine.processor() or machine.machine()
