"""What a build says at its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.report.built import built_lines
from runtime.bundle import Manifest, load_bundle
from tests.runtime import handmade


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("built") / "bundle"
    handmade.build_bundle(folder)
    return load_bundle(folder).manifest


def test_size_time_memory_and_what_was_not_tested(manifest: Manifest) -> None:
    made, tested = built_lines(Path("out/mine"), manifest, "a CPU", 83.4)
    assert made.startswith("built out/mine: ")
    assert f" in {len(manifest.files) + 1} files, in 1 min 23 s, with at most " in made
    assert made.endswith(f"of memory (status: {manifest.status})")
    assert tested == "not tested yet: whether it computes what it should on this machine ('verify' tells)"


def test_a_bundle_for_a_gpu_says_that_it_has_not_run_there(manifest: Manifest) -> None:
    target = manifest.target.model_copy(update={"compute_capability": "12.0"})
    built = manifest.model_copy(update={"target": target, "status": "built, not executed", "golden": None})
    _, tested = built_lines(Path("out/mine"), built, "GeForce RTX 5090", 5)
    assert "nothing of it has run on a GeForce RTX 5090" in tested
    assert tested.endswith("golden vectors, which this one lacks")
    verified = built.model_copy(update={"status": "built and verified on NVIDIA H200"})
    assert len(list(built_lines(Path("out/mine"), verified, "H200", 5))) == 1


@pytest.mark.parametrize(
    ("backend", "capability", "status", "expected"),
    [
        ("onnxruntime", None, "built", "whether it computes what it should on this machine"),
        ("inductor", None, "built", "whether it computes what it should on this machine"),
        ("inductor", "9.0", "built, not executed", "nothing of it has run on a H200"),
        ("inductor", "9.0", "built", "nothing of it has run on a H200"),
        ("tensorrt-rtx", "12.0", "built, not executed", "nothing of it has run on a H200"),
        ("tensorrt", "12.0", "built and verified on NVIDIA H200", None),
    ],
)
def test_what_every_backend_leaves_untested(
    manifest: Manifest, backend: str, capability: str | None, status: str, expected: str | None
) -> None:
    target = manifest.target.model_copy(update={"compute_capability": capability})
    built = manifest.model_copy(update={"target": target, "status": status, "backend": backend})
    _, *tested = built_lines(Path("out/mine"), built, "H200", 5)
    assert len(tested) == (expected is not None)
    assert all(str(expected) in line for line in tested)
