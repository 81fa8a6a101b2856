"""Bundles that several GPU tests read, built once per run. Do not write into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

BundleNamed = Callable[[str], Path]


@pytest.fixture(scope="session")
def bundle_named(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BundleNamed]:
    """Gives the bundle of a name in `tests.gpu.bundles.SPECS`; skips where it cannot be built."""
    from tests.gpu import bundles

    builds = bundles.Builds(tmp_path_factory.mktemp("bundles"))

    def named(name: str) -> Path:
        spec = bundles.SPECS[name]
        if bundles.target_of(spec) is None:
            pytest.skip(f"{name} is not built for this GPU")
        if spec.backend == "tensorrt-rtx" and not bundles.has_rtx():
            pytest.skip("TensorRT-RTX is not installed")
        return builds.path(name)

    yield named
    builds.close()
