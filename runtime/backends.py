"""Which engine executes a bundle."""

from __future__ import annotations

from .bundle import Bundle
from .engine import Engine
from .errors import EngineError
from .memory import BufferPlan

__all__ = ["load_engine"]


def load_engine(bundle: Bundle, plan: BufferPlan, *, threads: int | None = None) -> Engine:
    """Load the engine for a bundle's backend and target.

    ``plan`` is :func:`~runtime.memory.plan_buffers` of the bundle, checked against memory by the caller.
    ``threads`` is the number of threads per forward of an engine that runs on the host.

    Raises:
        EngineError: the backend cannot run what the bundle was built for, or does not load.
    """
    manifest = bundle.manifest
    on_host = manifest.target.compute_capability is None
    if manifest.backend == "onnxruntime":
        from .onnxruntime_engine import OnnxRuntimeEngine

        return OnnxRuntimeEngine(bundle, plan, threads=threads)
    where = "the host" if on_host else f"a GPU of capability {manifest.target.compute_capability}"
    raise EngineError(
        f"bundle {manifest.name!r} was built with the {manifest.backend!r} backend for {where}, which this runtime "
        f"does not execute; rebuild it with --backend onnxruntime"
    )
