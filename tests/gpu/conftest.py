"""Bundles and kernels that several GPU tests take.

Bundles are built once per run, or kept where LIGHTFORCING_GPU_BUNDLES says. Set LIGHTFORCING_KERNELS to a folder that
`python -m plugins build` wrote to test shipped images; otherwise images for this device are built first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from plugins.eager.launch import Launcher, TorchKernels

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


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images for this GPU."""
    given = os.environ.get("LIGHTFORCING_KERNELS")
    if given:
        return Path(given)
    import torch

    from plugins.compile.kernels import build
    from plugins.kernels.specs import image_arch

    major, minor = torch.cuda.get_device_capability()
    out = tmp_path_factory.mktemp("kernels")
    build((image_arch(10 * major + minor),), out)
    return out


@pytest.fixture(scope="module", params=["cuda.core", "torch"])
def launcher(request: pytest.FixtureRequest) -> Launcher:
    """Of shipped images, and of kernels that are compiled just in time."""
    from plugins.eager.launch import TritonLauncher

    if request.param == "torch":
        return TritonLauncher()
    pytest.importorskip(
        "cuda.core", reason="cuda-core and cuda-bindings are not installed", exc_type=ImportError
    )
    from benchmarks.attention.launcher import ImageLauncher

    return ImageLauncher(request.getfixturevalue("image_folder"))


@pytest.fixture(scope="module")
def kernels(launcher: Launcher) -> TorchKernels:
    """The kernels as shipped images and just in time."""
    from plugins.eager.launch import TorchKernels

    return TorchKernels(launcher)
