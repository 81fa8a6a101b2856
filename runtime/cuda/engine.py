"""The engine that runs on a GPU: a program, the CUDA executor, a library for its components, and the kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Bundle, Manifest
from runtime.bundle.weights_file import WeightsFile
from runtime.errors import BundleError, EngineError
from runtime.frames import DeviceFrames
from runtime.program.attention import read_tables
from runtime.program.buffers import BufferPlan
from runtime.program.builder import build_program
from runtime.program.engine import ProgramEngine
from runtime.program.kernels import KernelLibrary
from runtime.program.program import KernelLaunch, Program

from .driver import CudaDriver
from .executor import CudaExecutor
from .kernels import KernelLauncher, cuda_core
from .library import ComponentLibrary

if TYPE_CHECKING:
    from runtime.bundle.golden import ComponentRunner

__all__ = ["CudaEngine", "KernelImages", "constants", "load_cuda_engine", "open_library"]


@dataclass(frozen=True)
class _Weights(Mapping[str, NDArray[Any]]):
    """What `load` feeds: small constants, and the weights file's tensors as `weights.NAME`."""

    small: Mapping[str, NDArray[Any]]
    file: WeightsFile | None

    def __getitem__(self, name: str) -> NDArray[Any]:
        if self.file is not None and name.startswith("weights."):
            return self.file[name.removeprefix("weights.")]
        return self.small[name]

    def __iter__(self) -> Any:
        yield from self.small
        if self.file is not None:
            yield from (f"weights.{name}" for name in self.file)

    def __len__(self) -> int:
        return len(self.small) + (0 if self.file is None else len(self.file))


def constants(
    manifest: Manifest, weights: WeightsFile | None, tables: Mapping[str, NDArray[Any]] = MappingProxyType({})
) -> Mapping[str, NDArray[Any]]:
    """Values of what a program's `load` feeds; tensors of `weights` are read when their turn comes."""
    steps = {f"step.{row}": np.array(row, dtype=np.int32) for row in range(manifest.schedule.row_count)}
    table = np.array(manifest.sparsity.keep_q20, dtype=np.int32)
    return _Weights({**steps, "keep_q20": table, **tables}, weights)


class KernelImages:
    """Launches the bundle's kernel images: a `LaunchKernel`."""

    def __init__(self, bundle: Bundle, driver: CudaDriver) -> None:
        self._library = KernelLibrary.of(bundle, driver.capability)
        self._launcher = KernelLauncher(self._library, driver.device)
        self._streams: dict[int, Any] = {}

    def __call__(self, launch: KernelLaunch, addresses: Mapping[str, int], stream: int) -> None:
        if stream not in self._streams:
            self._streams[stream] = cuda_core().Stream.from_handle(stream)
        plan = self._library.plan(launch.kernel, launch.problem, addresses, launch.options)
        self._launcher.launch(plan, self._streams[stream])


def _no_kernels(launch: KernelLaunch, addresses: Mapping[str, int], stream: int) -> None:
    raise EngineError(
        f"the bundle holds no kernel images, and its execution launches {launch.kernel!r}; rebuild the bundle"
    )


def open_library(bundle: Bundle, driver: CudaDriver) -> ComponentLibrary:
    """The library that runs the bundle's engines.

    Raises:
        EngineError: there is none for this backend, or not the right version of it.
    """
    backend = bundle.manifest.backend
    if backend == "tensorrt-rtx":
        from .tensorrt_rtx import TensorRtRtxLibrary

        return TensorRtRtxLibrary(bundle, driver, str(driver.device.name))
    if backend == "inductor":
        from .inductor import InductorLibrary

        return InductorLibrary(bundle, driver)
    if backend == "tensorrt":
        from .tensorrt_classic import TensorRtLibrary

        return TensorRtLibrary(bundle, driver)
    raise EngineError(
        f"bundle {bundle.manifest.name!r} has the backend {backend!r}, which does not run on a GPU; load it on the host"
    )


class CudaEngine(ProgramEngine):
    """Implements `Engine` on one GPU."""

    on_device = True

    def __init__(self, bundle: Bundle, program: Program, driver: CudaDriver, executor: CudaExecutor) -> None:
        super().__init__(bundle.manifest, program, executor)
        self._bundle = bundle
        self._driver = driver
        self._cuda = executor

    @property
    def executor(self) -> CudaExecutor:
        """The executor; its `counters` tell what was launched and how often the host waited."""
        return self._cuda

    def decode_on_device(self, session: int, latent: int, *, first: bool) -> tuple[DeviceFrames, float]:
        """See `Engine.decode_on_device`."""
        lease, written = self._cuda.lease_frames(), 0
        shape = self._program.buffers["frames_next"].buffer.shape[1:]

        def take(buffer: str, count: int, index: int) -> None:
            nonlocal written
            self._cuda.keep(session, buffer, lease.address + written * math.prod(shape))
            written += count

        seconds, judged = self._decode(session, latent, first, take)
        seconds += self._cuda.finish_decoding()
        judged.require_finite()
        return DeviceFrames(lease, (written, *shape), self._cuda.driver.dlpack_device), seconds

    def component_runner(self) -> ComponentRunner:
        """See `Engine.component_runner`."""
        from .runner import CudaComponentRunner

        return CudaComponentRunner(self._bundle, self._driver, self._cuda)


def load_cuda_engine(bundle: Bundle, plan: BufferPlan, *, device: int = 0, graphs: bool = True) -> CudaEngine:
    """Load the engine for the GPU that the bundle was built for; `graphs` as the executor takes it.

    Raises:
        EngineError: no such GPU is here, or an engine or kernel does not load.
        BundleError: the manifest cannot be turned into an execution.
    """
    manifest = bundle.manifest
    driver = CudaDriver(device)
    found = "{}.{}".format(*driver.capability)
    if found != manifest.target.compute_capability:
        raise EngineError(
            f"bundle {manifest.name!r} was built for {manifest.target.name}, compute capability "
            f"{manifest.target.compute_capability}, and CUDA device {device} ({driver.device.name}) has {found}; build "
            f"a bundle for this GPU"
        )
    program = build_program(bundle, plan)
    launch = _no_kernels
    if manifest.kernels is not None:
        launch = KernelImages(bundle, driver)
    library = open_library(bundle, driver)
    weights = None if manifest.segments is None else WeightsFile(bundle.opened(manifest.segments.weights))
    try:
        fed = constants(manifest, weights, read_tables(bundle))
        executor = CudaExecutor(program, driver, library, launch, fed, graphs=graphs)
        try:
            if weights is not None:
                weights.check()
        except BundleError:
            executor.close()
            raise
    finally:
        if weights is not None:
            weights.close()
    return CudaEngine(bundle, program, driver, executor)
