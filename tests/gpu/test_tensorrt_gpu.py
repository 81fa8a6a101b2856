"""The tensorrt backend on a GPU: built there, right there, and refused when it is not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from export.machine import find_gpus, importable
from export.request.targets import Target, list_targets
from plugins.compile.libraries import find_plugin
from runtime.bundle import load_bundle
from runtime.pipeline import Pipeline
from runtime.verify import VERDICT_NAME
from tests import conftest

GPUS = find_gpus()
MISSING = GPUS.problem or next(
    (
        f"{module} is not installed"
        for module in ("tensorrt", "cuda.core", "triton")
        if not importable(module)
    ),
    "",
)
if not MISSING and find_plugin() is None:
    MISSING = "there is no plugin library; run python -m plugins build --tensorrt"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(MISSING), reason=MISSING)]

EMBEDDING = np.random.default_rng(4).standard_normal((64, 64), dtype=np.float32)


@pytest.fixture(scope="module")
def target() -> Target:
    capability = GPUS.gpus[0].compute_capability
    for candidate in list_targets():
        if candidate.compute_capability == capability:
            return candidate
    pytest.skip(f"there is no target of compute capability {capability}")


@pytest.fixture(scope="module", params=["bf16", "fp8"])
def bundle(request: pytest.FixtureRequest, target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param not in target.precisions:
        pytest.skip(f"{target.name} does not compute in {request.param}")
    changes = {"target": target, "backend": "tensorrt", "precision": request.param}
    return conftest.build(tmp_path_factory.mktemp("tensorrt"), "short", **changes)


def test_every_engine_is_measured_where_it_was_built(bundle: Path) -> None:
    manifest = load_bundle(bundle).manifest
    assert manifest.status.startswith("built and verified on ")
    assert manifest.golden is not None
    assert set(manifest.golden.measured) == set(manifest.components)
    for name, error in manifest.golden.measured.items():
        assert error <= manifest.golden.tolerances[name], name
    step = manifest.components["step"].cost
    assert step is not None
    assert (manifest.precision == "fp8") == bool(step.gemms.get("fp8"))


def test_the_first_load_verifies_and_a_rollout_follows(bundle: Path, tiny_bundle: Path) -> None:
    def frames(folder: Path) -> np.ndarray:
        with (
            Pipeline.load(folder) as pipeline,
            pipeline.session(embedding=EMBEDDING, seed=2) as session,
        ):
            return np.concatenate([chunk.frames for chunk in session.stream(chunks=3)]).astype(float)

    found, expected = frames(bundle), frames(tiny_bundle)
    assert json.loads((bundle / VERDICT_NAME).read_text())["passed"]
    assert np.linalg.norm(found - expected) < 0.2 * np.linalg.norm(expected - 127.5)
