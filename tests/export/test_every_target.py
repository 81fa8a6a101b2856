"""Every variant of every backend but TensorRT-RTX, whose engines have a test of their own, on a target of each kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from export.machine import find_gpus
from export.request.capability import BACKENDS, build_problem
from export.request.targets import Target, list_targets, list_variants
from runtime import Pipeline
from runtime.bundle import load_bundle
from runtime.verify.dry_run import dry_run
from tests.conftest import build

KINDS = {
    (backend, target.compute_capability): target
    for target in reversed(list_targets())
    for backend in dict.fromkeys((*target.backends, "inductor"))
    if backend != "tensorrt-rtx" and (backend != "onnxruntime" or target.compute_capability is None)
}
"""A target of each architecture; ONNX Runtime's bundles for a GPU's machine are those for a CPU."""
CASES = [
    pytest.param(backend, target, precision, variant.name, id=f"{backend}-{precision}-{name}-{variant.name}")
    for (backend, name), target in KINDS.items()
    for precision in target.precisions
    if precision in BACKENDS[backend].precisions and (precision != "fp32" or name is None)
    for variant in list_variants()
]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("backend", "target", "precision", "variant"), CASES)
def test_it_is_built_where_it_can_be(
    tmp_path: Path, backend: str, target: Target, precision: str, variant: str
) -> None:
    if problem := build_problem(BACKENDS[backend], target, find_gpus()):
        pytest.skip(problem)
    turns = variant in ("rolling", "longlive") and backend == "onnxruntime"  # chunks take turns in each layer
    execution = "segmented" if turns else BACKENDS[backend].execution[0]
    folder = build(
        tmp_path, variant, backend=backend, target=target, precision=precision, execution=execution
    )
    manifest = load_bundle(folder).manifest
    assert (manifest.backend, manifest.precision, manifest.variant) == (backend, precision, variant)
    if target.compute_capability is not None:
        assert dry_run(load_bundle(folder)).checked_runs
        return
    with Pipeline.load(folder, threads=1) as pipe:
        text = pipe.manifest.text
        embedding = np.zeros((text.text_len, text.dim), np.float32)
        with pipe.session(embedding=embedding, seed=1) as session:
            frames = [next(session.stream()).frames for _ in range(2)]
    assert all(chunk.dtype == np.uint8 and chunk.std() > 0 for chunk in frames)
