"""TensorRT engines, as far as it goes without TensorRT: versions, and which plugin library is loaded."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest

from runtime.bundle import Bundle, file_entry, load_bundle
from runtime.cuda import tensorrt_classic
from runtime.cuda.tensorrt import TENSORRT, require_version
from runtime.cuda.tensorrt_classic import PLUGIN_FILE, TensorRtLibrary, plugin_entry
from runtime.errors import BundleError, BundleIntegrityError, EngineError
from tests.runtime.handmade import edit_manifest


def with_plugin(source: Path, folder: Path, content: bytes = b"library") -> Bundle:
    shutil.copytree(source, folder)
    (folder / PLUGIN_FILE).write_bytes(content)

    def edit(raw: dict[str, Any]) -> None:
        raw["backend"], raw["library"] = "tensorrt", {"name": "tensorrt", "version": "11.4.0.106"}
        raw["target"] = {"name": "rtx5090", "compute_capability": "12.0"}
        raw["files"].append(file_entry(folder, PLUGIN_FILE).model_dump())

    edit_manifest(folder, edit)
    return load_bundle(folder)


class Registry:
    """Stands in for TensorRT's registry of plugins."""

    def __init__(self, *names: str) -> None:
        self.names, self.loaded = names, list[str]()

    def load_library(self, path: str) -> object:
        self.loaded.append(path)
        return object()

    def get_creator(self, name: str, version: str, namespace: str) -> object:
        assert (version, namespace) == ("1", "lightforcing")
        return object() if name in self.names else None


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_classic, "_registered", {})


def test_engines_run_with_the_version_that_built_them(bundle: Path, tmp_path: Path) -> None:
    found = with_plugin(bundle, tmp_path / "b")
    require_version(found, TENSORRT, "11.4.0.106")
    with pytest.raises(
        EngineError, match=r"TensorRT 11\.4\.0\.106 .* but 11\.5 is installed.*pip install tensorrt==11"
    ):
        require_version(found, TENSORRT, "11.5")
    with pytest.raises(EngineError, match="which is not installed"):
        require_version(found, TENSORRT, None)
    with pytest.raises(BundleError, match="its manifest names no library"):
        require_version(load_bundle(bundle), TENSORRT, "11.4.0.106")


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_without_tensorrt_the_library_says_what_to_install(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"not installed: run `pip install tensorrt==11\.4"):
        TensorRtLibrary(with_plugin(bundle, tmp_path / "b"), driver=None)  # type: ignore[arg-type]


def test_a_plugin_library_that_changed_is_never_loaded(bundle: Path, tmp_path: Path) -> None:
    found = with_plugin(bundle, tmp_path / "b")
    assert len(plugin_entry(found)) == 64
    (found.root / PLUGIN_FILE).write_bytes(b"another")
    registry = Registry("HierarchicalSparseAttention", "QKPrepare")
    with pytest.raises(BundleIntegrityError, match="was changed since the bundle was loaded"):
        tensorrt_classic._register_plugins(found, registry)
    assert registry.loaded == []
    with pytest.raises(BundleError, match=r"has no libnvinfer_plugin_lightforcing\.so"):
        plugin_entry(load_bundle(bundle))


def test_plugins_are_registered_once_and_from_one_library(bundle: Path, tmp_path: Path) -> None:
    registry = Registry("HierarchicalSparseAttention", "QKPrepare")
    first, same = with_plugin(bundle, tmp_path / "a"), with_plugin(bundle, tmp_path / "b")
    tensorrt_classic._register_plugins(first, registry)
    tensorrt_classic._register_plugins(same, registry)
    assert registry.loaded == [str(first.root / PLUGIN_FILE)]
    other = with_plugin(bundle, tmp_path / "c", b"another build")
    with pytest.raises(EngineError, match="plugin library of another build"):
        tensorrt_classic._register_plugins(other, registry)


def test_a_library_without_the_plugins_is_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="registers no plugin QKPrepare with TensorRT"):
        tensorrt_classic._register_plugins(
            with_plugin(bundle, tmp_path / "b"), Registry("HierarchicalSparseAttention")
        )
