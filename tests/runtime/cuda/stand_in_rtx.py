"""Stands in for the module `tensorrt_rtx` where there is no GPU, and holds what uses it to the library's rules.

That the real module has every name used here is tests/export/backends/test_trt_names.py's business.
"""

from __future__ import annotations

import json
import weakref
from types import SimpleNamespace
from typing import Any

from runtime.bundle import Bundle
from tests.runtime.simulated_gpu import SimulatedDriver

TYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "float8_e4m3fn": "FP8",
    "float4_e2m1": "FP4",
    "int32": "INT32",
    "int64": "INT64",
    "uint8": "UINT8",
    "bool": "BOOL",
}


class StandIn:
    """The module. Engine files hold their own names; kernels are "compiled" at an engine's first run."""

    __version__ = "1.7.1.116"
    DataType = SimpleNamespace(**{name: name for name in TYPES.values()})
    TensorIOMode = SimpleNamespace(INPUT="INPUT", OUTPUT="OUTPUT")
    ExecutionContextAllocationStrategy = SimpleNamespace(STATIC="STATIC", USER_MANAGED="USER_MANAGED")
    CudaGraphStrategy = SimpleNamespace(DISABLED="DISABLED", WHOLE_GRAPH_CAPTURE="WHOLE_GRAPH_CAPTURE")

    def __init__(self, bundle: Bundle, driver: SimulatedDriver | None = None) -> None:
        """With a driver, engines notice that a stream is captured."""
        self.bundle = bundle
        self.driver = driver
        self.compiled: list[str] = []
        """Components whose kernels were compiled and not found in a cache, in order."""
        self.serializes = True
        self.greed = 0
        """Bytes of activation memory that engines want beyond what the manifest says."""

    class Logger:
        WARNING = 1

        def __init__(self, severity: int) -> None:
            pass

    def Runtime(self, logger: Logger) -> Any:  # noqa: N802
        return SimpleNamespace(deserialize_cuda_engine=self._engine)

    def _engine(self, blob: bytes) -> Engine | None:
        parts = self.bundle.manifest.components
        return next(
            (Engine(self, name) for name, part in parts.items() if part.file == blob[24:].decode()), None
        )


class Engine:
    def __init__(self, module: StandIn, name: str) -> None:
        part = module.bundle.component(name)
        self.module, self.name = module, name
        self._tensors = [("INPUT", spec) for spec in part.inputs] + [
            ("OUTPUT", spec) for spec in part.outputs
        ]
        self.num_io_tensors = len(self._tensors)
        self.device_memory_size_v2 = (part.cost.activation_bytes if part.cost else 0) + module.greed

    def get_tensor_name(self, index: int) -> str:
        return self._tensors[index][1].name

    def _of(self, name: str) -> tuple[str, Any]:
        return next(found for found in self._tensors if found[1].name == name)

    def get_tensor_mode(self, name: str) -> str:
        return self._of(name)[0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._of(name)[1].shape)

    def get_tensor_dtype(self, name: str) -> str:
        return TYPES[self._of(name)[1].dtype]

    def create_runtime_config(self) -> Config:
        return Config()

    def create_execution_context(self, config: Config) -> Context:
        assert config.strategy == "USER_MANAGED", "engines were built to take memory that they are given"
        assert config.cuda_graph_strategy == "DISABLED", "a graph inside of a capture"
        return Context(self, config)


class Config:
    strategy, cuda_graph_strategy, cache = "STATIC", "DISABLED", None

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Cache:
        return Cache()

    def set_runtime_cache(self, cache: Cache) -> bool:
        self.cache = cache
        return True


class Cache:
    """Kernels by component; refuses a blob that it did not write."""

    def __init__(self) -> None:
        self.kernels: set[str] = set()
        self.writes = True

    def serialize(self) -> bytes | None:
        return json.dumps(sorted(self.kernels)).encode() if self.writes else None

    def deserialize(self, blob: bytes) -> bool:
        try:
            self.kernels = set(json.loads(blob))
        except ValueError:
            return False
        return True


class Context:
    def __init__(self, engine: Engine, config: Config) -> None:
        assert config.cache is not None
        config.cache.writes = engine.module.serializes
        self._engine, self._cache = engine, config.cache
        self._config = weakref.ref(config)
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] = (0, 0)

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % 256 == 0 and size >= self._engine.device_memory_size_v2
        self._memory = address, size

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 256 == 0, f"{self._engine.name}: {name}"
        self._engine._of(name)
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        engine, module = self._engine, self._engine.module
        assert self._config() is not None, "contexts give out their configuration"
        assert len(self._addresses) == engine.num_io_tensors
        assert self._memory[1] >= engine.device_memory_size_v2
        if engine.name not in self._cache.kernels:
            streams = {} if module.driver is None else module.driver._streams
            assert all(target.captured is None for target in streams.values()), "compiles in a capture"
            self._cache.kernels.add(engine.name)
            module.compiled.append(engine.name)
        return True
