"""Real-time rollout of a bundle.

    from runtime import Pipeline

    with Pipeline.load("engines/built/demo") as pipe:
        with pipe.session(prompt="a red circle on grey grows at the centre", seed=7) as session:
            for chunk in session.stream(seconds=5):
                show(chunk.frames)

Imports neither torch nor onnx nor any other package of this project.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bundle import Bundle, Manifest, load_bundle
    from .errors import (
        BundleError,
        BundleIntegrityError,
        BundleSchemaError,
        CapacityError,
        ClosedError,
        EngineError,
        InputError,
        LightForcingError,
        SessionCancelledError,
        SessionFailedError,
    )
    from .pipeline import Pipeline
    from .scheduler import Chunk
    from .session import ChunkStream, Session
    from .verify import VerificationError

__all__ = [
    "Bundle",
    "BundleError",
    "BundleIntegrityError",
    "BundleSchemaError",
    "CapacityError",
    "Chunk",
    "ChunkStream",
    "ClosedError",
    "EngineError",
    "InputError",
    "LightForcingError",
    "Manifest",
    "Pipeline",
    "Session",
    "SessionCancelledError",
    "SessionFailedError",
    "VerificationError",
    "load_bundle",
]

_MODULES = {
    "bundle": ("Bundle", "Manifest", "load_bundle"),
    "pipeline": ("Pipeline",),
    "scheduler": ("Chunk",),
    "session": ("ChunkStream", "Session"),
    "verify": ("VerificationError",),
}


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that `runtime.bundle` and the command line's --help stay light.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = next((module for module, names in _MODULES.items() if name in names), "errors")
    return getattr(import_module(f".{module}", __name__), name)
