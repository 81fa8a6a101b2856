"""What of loading TensorRT-RTX engines needs no GPU: versions, and where compiled kernels are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.bundle import Bundle, Library, load_bundle
from runtime.cuda.tensorrt import TENSORRT_RTX, require_version
from runtime.cuda.tensorrt_rtx import TensorRtRtxLibrary, cache_file
from runtime.errors import BundleError, EngineError
from tests.runtime import device_bundles
from tests.runtime.simulated_gpu import SimulatedDriver


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(device_bundles.build_device_bundle(tmp_path_factory.mktemp("rtx") / "bundle"))


def with_library(bundle: Bundle, library: Library | None) -> Bundle:
    return Bundle(bundle.root, bundle.manifest.model_copy(update={"library": library}))


def test_only_the_version_that_built_an_engine_loads_it(loaded: Bundle) -> None:
    require_version(loaded, TENSORRT_RTX, "1.7.1.116")
    for installed, found in (("1.7.1.117", "1.7.1.117 is installed"), (None, "which is not installed")):
        with pytest.raises(EngineError, match=rf"{found}.*pip install tensorrt-rtx-cu13==1\.7\.1\.116"):
            require_version(loaded, TENSORRT_RTX, installed)
    for library in (None, Library(name="torch", version="2.13.0")):
        with pytest.raises(BundleError, match="its manifest names"):
            require_version(with_library(loaded, library), TENSORRT_RTX, "1.7.1.116")


def test_the_installed_library_is_asked(loaded: Bundle) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed", exc_type=ImportError)
    other = with_library(loaded, Library(name="tensorrt-rtx", version="0.0.1"))
    with pytest.raises(EngineError, match=r"pip install tensorrt-rtx-cu13==0\.0\.1"):
        TensorRtRtxLibrary(other, SimulatedDriver(), "GPU")


def test_compiled_kernels_lie_beside_the_bundle_or_in_the_cache(
    loaded: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = cache_file(loaded, "NVIDIA GeForce RTX 5090")
    assert beside.parent == loaded.root.parent
    assert beside.name.startswith("bundle.NVIDIA-GeForce-RTX-5090-1.7.1.116-")
    assert cache_file(loaded, "NVIDIA GeForce RTX 5080") != beside
    newer = with_library(loaded, Library(name="tensorrt-rtx", version="1.8"))
    assert cache_file(newer, "NVIDIA GeForce RTX 5090") != beside
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert cache_file(loaded, "NVIDIA GeForce RTX 5090") == tmp_path / "lightforcing" / beside.name
