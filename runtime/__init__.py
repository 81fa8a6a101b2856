"""Real-time rollout of a bundle.

    from runtime import Pipeline

    with Pipeline.load("engines/built/demo") as pipe:
        with pipe.session(prompt="a red circle on grey grows at the centre", seed=7) as session:
            for chunk in session.stream(seconds=5):
                show(chunk.frames)

Imports neither torch nor onnx nor any other package of this project.

ONNX Runtime since 1.29 reports to its maker unless `ORT_DISABLE_TELEMETRY` is set; importing this package sets it,
where it is not set to anything else.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bundle import Bundle, Manifest, load_bundle
    from .errors import (
        BundleError,
        BundleIntegrityError,
        BundleSchemaError,
        CapacityError,
        ChunkTimeoutError,
        ClosedError,
        EngineError,
        InputError,
        LightForcingError,
        SessionCancelledError,
        SessionFailedError,
    )
    from .files import atomic_output
    from .pipeline import Health, Pipeline
    from .scheduler import Chunk, ChunkStarted, SessionStatistics
    from .session import ChunkStream, Session
    from .verify import VerificationError
    from .video import open_video, read_image

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = [
    "Bundle",
    "BundleError",
    "BundleIntegrityError",
    "BundleSchemaError",
    "CapacityError",
    "Chunk",
    "ChunkStarted",
    "ChunkStream",
    "ChunkTimeoutError",
    "ClosedError",
    "EngineError",
    "Health",
    "InputError",
    "LightForcingError",
    "Manifest",
    "Pipeline",
    "Session",
    "SessionCancelledError",
    "SessionFailedError",
    "SessionStatistics",
    "VerificationError",
    "atomic_output",
    "load_bundle",
    "open_video",
    "read_image",
]

_MODULES = {
    "bundle": ("Bundle", "Manifest", "load_bundle"),
    "pipeline": ("Health", "Pipeline"),
    "scheduler": ("Chunk", "ChunkStarted", "SessionStatistics"),
    "session": ("ChunkStream", "Session"),
    "verify": ("VerificationError",),
    "files": ("atomic_output",),
    "video": ("open_video", "read_image"),
}


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that `runtime.bundle` and the command line's --help stay light.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = next((module for module, names in _MODULES.items() if name in names), "errors")
    return getattr(import_module(f".{module}", __name__), name)
