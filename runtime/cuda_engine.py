"""The engine that runs on a GPU."""

from __future__ import annotations

from .bundle import Bundle
from .engine import Engine
from .errors import EngineError

__all__ = ["load_cuda_engine"]


def load_cuda_engine(bundle: Bundle, sessions: int) -> Engine:
    """Load the engine for the GPU that the bundle was built for."""
    raise EngineError(
        f"bundle {bundle.manifest.name!r} is for {bundle.manifest.target.name}; this version runs bundles for the CPU"
    )
