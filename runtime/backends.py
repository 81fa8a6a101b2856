"""Which engine executes a bundle."""

from __future__ import annotations

from runtime.program.buffers import BufferPlan, runs_on_gpu

from .bundle import Bundle
from .engine import Engine

__all__ = ["load_engine", "runs_on_host"]


def runs_on_host(bundle: Bundle) -> bool:
    """Whether the bundle is executed on the host: by ONNX Runtime, or by packages compiled for a CPU."""
    return not runs_on_gpu(bundle.manifest)


def load_engine(
    bundle: Bundle,
    plan: BufferPlan,
    *,
    threads: int | None = None,
    graphs: bool = True,
    device: int = 0,
) -> Engine:
    """Load the engine for a bundle's backend and target.

    `plan` is `plan_buffers` of the bundle, checked against memory by the caller.
    `threads` is the number of threads per forward on the host (default: `default_threads()` there). `graphs`
    says whether an engine on a GPU replays CUDA graphs or enqueues every operation anew, `device` which GPU it takes.

    Raises:
        EngineError: the backend cannot run what the bundle was built for, or does not load.
    """
    if runs_on_host(bundle):
        from runtime.host.engine import HostEngine

        return HostEngine(bundle, plan, threads=threads)
    from runtime.cuda.engine import load_cuda_engine

    return load_cuda_engine(bundle, plan, device=device, graphs=graphs)
