"""Bundles that several tests read, built once per run."""

from __future__ import annotations

from pathlib import Path

import pytest


def build(out: Path, variant: str, **changes: object) -> Path:
    """Build a `tiny` bundle for the CPU through the code path of the command line."""
    from export.build import BuildRequest, build_bundle
    from export.request.targets import load_target, load_variant
    from export.request.weights import Weights
    from lightforcing_ref.config import PRESETS

    preset = PRESETS["tiny"]
    settings: dict[str, object] = {
        "target": load_target("cpu"),
        "variant": load_variant(variant),
        "weights": Weights(preset, seed=0),
        "height": preset.height,
        "width": preset.width,
        "backend": "onnxruntime",
        "precision": "fp32",
        "out": out,
        "name": variant,
    }
    return build_bundle(BuildRequest(**settings | changes))


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` with random weights, variant `short`, with a specialised graph per chunk. Do not write into it."""
    return build(tmp_path_factory.mktemp("bundles"), "short", per_chunk=True)


@pytest.fixture(scope="session")
def tiny_long_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` with random weights, variant `long`: a sliding window and window-relative sinks."""
    return build(tmp_path_factory.mktemp("bundles"), "long")
