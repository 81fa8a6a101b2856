"""Bundles that several GPU tests read. They are built once per run, or kept where LIGHTFORCING_GPU_BUNDLES says."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

BundleNamed = Callable[[str], Path]


@pytest.fixture(scope="session")
def bundle_named(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BundleNamed]:
    """Gives the bundle of a name in `tests.gpu.bundles.SPECS`; skips where it cannot be built."""
    from tests.gpu import bundles

    kept = os.environ.get("LIGHTFORCING_GPU_BUNDLES")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("bundles")
    folder.mkdir(parents=True, exist_ok=True)
    builds = bundles.Builds(folder)

    def named(name: str) -> Path:
        spec = bundles.SPECS[name]
        if bundles.target_of(spec) is None:
            pytest.skip(f"{name} is not built for this GPU")
        if spec.backend == "tensorrt-rtx" and not bundles.has_rtx():
            pytest.skip("TensorRT-RTX is not installed")
        return builds.path(name)

    yield named
    builds.close()
