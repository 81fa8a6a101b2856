"""Bundles that several tests read, built once per run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def build(out: Path, name: str, **changes: object) -> Path:
    """Build a `tiny` bundle for the CPU, of the variant `name`, through the code path of the command line."""
    from export.build import BuildRequest, build_bundle
    from export.request.targets import load_target, load_variant
    from export.request.weights import Weights
    from lightforcing_ref.config import PRESETS

    preset = PRESETS["tiny"]
    settings: dict[str, object] = {
        "target": load_target("cpu"),
        "weights": Weights(preset, seed=0),
        "height": preset.height,
        "width": preset.width,
        "backend": "onnxruntime",
        "precision": "fp32",
        "out": out,
        "name": name,
    } | changes
    if "variant" not in settings:
        settings["variant"] = load_variant(name)
    return build_bundle(BuildRequest(**settings))


def shared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Path]) -> Path:
    """What `make` makes in a folder, made by the first worker of a run that asks, and read by all of them."""
    workers = "PYTEST_XDIST_WORKER" in os.environ
    folder = (factory.getbasetemp().parent if workers else factory.getbasetemp()) / "shared" / name
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / "made"
    with FileLock(folder / "lock"):
        if not made.exists():
            made.write_text(str(make(folder)))
    return Path(made.read_text())


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` with random weights, variant `short`: a graph per chunk, a video encoder. Do not write into it."""
    return shared(
        tmp_path_factory, "tiny", lambda out: build(out, "short", per_chunk=True, with_encoder=True)
    )


@pytest.fixture(scope="session")
def tiny_long_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` with random weights, variant `long`: a sliding window and window-relative sinks."""
    return shared(tmp_path_factory, "tiny-long", lambda out: build(out, "long"))


QUICK = (
    "tests/test_",
    "tests/export/cli/test_doctor.py",
    "tests/export/graph/test_partition.py",
    "tests/export/graph/test_tensor_files.py",
    "tests/export/parts/test_worker.py",
    "tests/export/request/",
    "tests/export/test_progress.py",
    "tests/lightforcing_ref/",
    "tests/plugins/eager/",
    "tests/plugins/nodes/",
    "tests/plugins/test_contract.py",
    "tests/runtime/",
    "tests/serving/test_places.py",
    "tests/serving/test_playout.py",
)
NOT_QUICK = (
    "tests/export/request/test_weights.py",
    "tests/lightforcing_ref/checkpoint/test_spec.py",
    "tests/lightforcing_ref/decoders/test_vae.py",
    "tests/lightforcing_ref/test_text.py",
    "tests/runtime/bundle/test_ranges.py",
    "tests/runtime/bundle/test_weights_file.py",
    "tests/runtime/cli/",
    "tests/runtime/cuda/test_cuda_driver.py",
    "tests/runtime/host/test_inductor_packages.py",
    "tests/runtime/program/",
    "tests/runtime/test_replaced_bundles.py",
    "tests/runtime/test_rollout_tiny.py",
    "tests/runtime/test_worst_days.py",
    "tests/runtime/verify/test_verify.py",
    "tests/test_docs.py",
    "tests/test_examples.py",
    "tests/test_packaging.py",
    "tests/test_portability.py",
    "tests/test_scarce.py",
    "tests/test_snippets_run.py",
)
BUILT = {"tiny_bundle", "tiny_long_bundle"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `quick` what `make quick` runs: what takes no second and needs no model to be built."""
    for item in items:
        name = item.nodeid.split("::")[0]
        slow = any(item.iter_markers("slow")) or any(item.iter_markers("gpu"))
        builds = BUILT & set(getattr(item, "fixturenames", ()))
        if name.startswith(QUICK) and not name.startswith(NOT_QUICK) and not slow and not builds:
            item.add_marker("quick")
