"""Single components on a GPU, for verification: memory of their own, one run, results back on the host."""

from __future__ import annotations

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import OPERATOR_COMPONENTS, PERSIST, Bundle, Component, nbytes
from runtime.bundle.dtypes import numpy_dtype
from runtime.bundle.golden import Arrays, Platform
from runtime.errors import EngineError
from runtime.program.attention import (
    attention_launches,
    attention_work,
    kernel_name,
    kernel_problem,
    persist_launches,
    persist_work,
    read_tables,
    table_buffer,
)
from runtime.program.buffers import Buffer
from runtime.program.builder import prepare_options
from runtime.program.program import ALIGNMENT, KernelLaunch

from .driver import CudaDriver, host_bytes
from .executor import CudaExecutor

__all__ = ["CudaComponentRunner"]

_DRIVER_VERSION = Path("/sys/module/nvidia/version")


class CudaComponentRunner:
    """Implements `ComponentRunner` with the engines and kernels of a loaded executor."""

    def __init__(self, bundle: Bundle, driver: CudaDriver, executor: CudaExecutor) -> None:
        self._bundle = bundle
        self._driver = driver
        self._executor = executor

    @property
    def platform(self) -> Platform:
        """See `ComponentRunner`."""
        installed = None
        with suppress(OSError):
            installed = _DRIVER_VERSION.read_text(encoding="ascii").strip()
        libraries: dict[str, str] = {}
        if self._bundle.manifest.library is not None:
            libraries[self._bundle.manifest.library.name] = self._bundle.manifest.library.version
        for package in ("cuda-bindings", "cuda-core"):
            with suppress(PackageNotFoundError):
                libraries[package] = version(package)
        major, minor = self._driver.capability
        return Platform(f"{self._driver.device.name} ({major}.{minor})", installed, libraries)

    def run(self, component: str, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """See `ComponentRunner`."""
        described = self._bundle.component(component)
        self._driver.enter()
        stream = self._driver.create_stream()
        memory = _Memory(self._driver, stream)
        try:
            addresses = {name: memory.put(value) for name, value in inputs.items()}
            outputs = {
                spec.name: Buffer(spec.name, spec.dtype, tuple(int(dim) for dim in spec.shape))
                for spec in described.outputs
            }
            addresses |= {name: memory.reserve(buffer.nbytes) for name, buffer in outputs.items()}
            if component == PERSIST:
                self._persist(described, inputs, addresses, memory, stream)
            else:
                self._enqueue(component, described, addresses, memory, stream)
            return {name: memory.get(addresses[name], buffer) for name, buffer in outputs.items()}
        finally:
            self._driver.sync(stream)
            memory.close()
            self._driver.destroy([stream], [])

    def _enqueue(
        self, name: str, component: Component, addresses: dict[str, int], memory: _Memory, stream: int
    ) -> None:
        manifest = self._bundle.manifest
        if component.file is not None:
            engine = self._executor.component(name)
            engine.enqueue(addresses, memory.reserve(engine.scratch_bytes), stream)
            return
        if manifest.kernels is None or name not in OPERATOR_COMPONENTS:
            raise EngineError(f"component {name!r} has neither an engine nor a kernel; rebuild the bundle")
        dtype = next(spec.dtype for spec in component.inputs if spec.name in ("qkv", "q"))
        if name == "qk_prepare":
            options = prepare_options(manifest)
            launch = KernelLaunch(
                kernel_name(manifest, "prepare"), kernel_problem(manifest, dtype), {}, options
            )
            self._executor.launch(launch, addresses, stream)
            return
        for work, (kind, shape) in attention_work(manifest, dtype, 0).items():
            addresses[work] = memory.put(np.zeros(nbytes(kind, shape), dtype=np.uint8))
        addresses["keep_q20"] = memory.put(np.array(manifest.sparsity.keep_q20, dtype=np.int32))
        tables = {buffer: memory.put(values) for buffer, values in read_tables(self._bundle).items()}
        for step in attention_launches(manifest, dtype):
            launch = KernelLaunch(step.kernel, step.problem, {}, step.options)
            own = {buffer: tables[table_buffer(tensor)] for buffer, tensor in step.tables.items()}
            self._executor.launch(launch, {**addresses, **own}, stream)

    def _persist(
        self,
        component: Component,
        inputs: Arrays,
        addresses: dict[str, int],
        memory: _Memory,
        stream: int,
    ) -> None:
        """Update a persistent set, and copy its frames out of the pool, in their order."""
        manifest = self._bundle.manifest
        for work, (kind, shape) in persist_work(manifest).items():
            addresses[work] = memory.reserve(nbytes(kind, shape))
        dtype = next(spec.dtype for spec in component.inputs if spec.name == "past_k")
        for step in persist_launches(manifest, dtype):
            launch = KernelLaunch(step.kernel, step.problem, {}, step.options)
            self._executor.launch(launch, addresses, stream)
        sinks = manifest.cache.sink_frames
        for spec in component.outputs:
            frames, *of_frame = (int(dim) for dim in spec.shape)
            size = nbytes(spec.dtype, tuple(of_frame))
            pool = addresses[spec.name.replace("kept_", "past_")]
            for place, slot in enumerate(inputs["frame_slots"][sinks : sinks + frames].tolist()):
                self._driver.copy(addresses[spec.name] + place * size, pool + slot * size, size, stream)


class _Memory:
    """Device memory of one run."""

    def __init__(self, driver: CudaDriver, stream: int) -> None:
        self._driver = driver
        self._stream = stream
        self._owned: list[int] = []

    def reserve(self, nbytes: int) -> int:
        """Bytes that hold anything; 0 for none."""
        if not nbytes:
            return 0
        self._owned.append(self._driver.alloc(-(-nbytes // ALIGNMENT) * ALIGNMENT))
        return self._owned[-1]

    def put(self, value: NDArray[Any]) -> int:
        """A copy of an array on the device."""
        array = np.ascontiguousarray(value)
        address = self.reserve(max(1, array.nbytes))
        with self._pinned(array.nbytes) as (pinned, memory):
            memory[: array.nbytes] = array.reshape(-1).view(np.uint8)
            self._driver.copy(address, pinned, array.nbytes, self._stream)
            self._driver.sync(self._stream)
        return address

    def get(self, address: int, buffer: Buffer) -> NDArray[Any]:
        """The contents of device memory."""
        with self._pinned(buffer.nbytes) as (pinned, memory):
            self._driver.copy(pinned, address, buffer.nbytes, self._stream)
            self._driver.sync(self._stream)
            copied = memory[: buffer.nbytes].copy()
        return copied.view(numpy_dtype(buffer.dtype)).reshape(buffer.shape)

    def close(self) -> None:
        """Give everything back."""
        for address in self._owned:
            self._driver.free(address)

    def _pinned(self, nbytes: int) -> _Pinned:
        return _Pinned(self._driver, max(1, nbytes))


class _Pinned:
    """Pinned memory for the length of a `with` block."""

    def __init__(self, driver: CudaDriver, nbytes: int) -> None:
        self._driver = driver
        self._nbytes = nbytes
        self._address = 0

    def __enter__(self) -> tuple[int, NDArray[np.uint8]]:
        self._address = self._driver.alloc_pinned(self._nbytes)
        return self._address, host_bytes(self._address, self._nbytes)

    def __exit__(self, *error: object) -> None:
        self._driver.free_pinned(self._address)
