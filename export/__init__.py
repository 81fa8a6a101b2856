"""Checkpoint -> ONNX -> engines -> bundle.

    from pathlib import Path
    from export import BuildRequest, build_bundle, load_target, load_variant, shipped_weights
    from lightforcing_ref.config import preset

    tiny = preset("tiny")
    folder = build_bundle(BuildRequest(
        target=load_target("cpu"), variant=load_variant("dense"), weights=shipped_weights(tiny, dense=True),
        height=tiny.height, width=tiny.width, backend="onnxruntime", precision="fp32",
        out=Path("engines/built"), name="demo",
    ))

The names below are the Python door to what `python -m export` does; other modules may change with any release.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.compare.against_reference import against_reference
    from export.request.capability import BACKENDS, choose_backend
    from export.request.geometry import StepPlan
    from export.request.request import BuildRequest, QuantizationRequest
    from export.request.targets import Target, Variant, list_targets, load_target, load_variant
    from export.request.weights import Weights, shipped_weights

    from .build import build_bundle, check_build, compile_bundle
    from .errors import BuildError, ComparisonError, ExportError, InputError

__all__ = [
    "BACKENDS",
    "BuildError",
    "BuildRequest",
    "ComparisonError",
    "ExportError",
    "InputError",
    "QuantizationRequest",
    "StepPlan",
    "Target",
    "Variant",
    "Weights",
    "against_reference",
    "build_bundle",
    "check_build",
    "choose_backend",
    "compile_bundle",
    "list_targets",
    "load_target",
    "load_variant",
    "shipped_weights",
]

_MODULES = {
    "build": ("build_bundle", "check_build", "compile_bundle"),
    "compare.against_reference": ("against_reference",),
    "errors": ("BuildError", "ComparisonError", "ExportError", "InputError"),
    "request.capability": ("BACKENDS", "choose_backend"),
    "request.geometry": ("StepPlan",),
    "request.request": ("BuildRequest", "QuantizationRequest"),
    "request.targets": ("Target", "Variant", "list_targets", "load_target", "load_variant"),
    "request.weights": ("Weights", "shipped_weights"),
}


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that the command line's --help stays light.
    from importlib import import_module

    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
