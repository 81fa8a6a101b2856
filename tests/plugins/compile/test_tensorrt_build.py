"""Building the libraries: what is looked for, what is refused, and the command line from sources to a library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from plugins.compile import libraries as tensorrt_build
from plugins.compile.kernels import BuildError
from runtime.errors import BundleError
from tests.plugins.launch import launch_interface as lf

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]


def test_plugin_is_found_by_name_or_where_builds_leave_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(tensorrt_build.PLUGIN_VARIABLE, raising=False)
    monkeypatch.setattr(tensorrt_build, "_PACKAGE", tmp_path / "package")
    monkeypatch.chdir(tmp_path)
    assert tensorrt_build.find_plugin() is None
    places = [
        tmp_path / "build" / "tensorrt" / tensorrt_build.PLUGIN_LIBRARY,
        tmp_path / "package" / "lib" / tensorrt_build.PLUGIN_LIBRARY,
        tmp_path / "elsewhere.so",
    ]
    for place in places[:2]:
        place.parent.mkdir(parents=True)
        place.touch()
        assert tensorrt_build.find_plugin() == place
    places[2].touch()
    monkeypatch.setenv(tensorrt_build.PLUGIN_VARIABLE, "elsewhere.so")
    assert tensorrt_build.find_plugin() == places[2]
    monkeypatch.setenv(tensorrt_build.PLUGIN_VARIABLE, "nowhere.so")
    with pytest.raises(BuildError, match=r"is 'nowhere\.so', which is not a file"):
        tensorrt_build.find_plugin()


def test_missing_cmake_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(BuildError, match="pip install cmake ninja"):
        tensorrt_build.build_libraries((90,), tmp_path, tmp_path / "out")


@lf.needs_tools
def test_windows_is_told_at_once_that_it_is_not_built_there(tmp_path: Path) -> None:
    """As a build for Windows is configured: before any compiler is tried, and before any kernel is asked for."""
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert cmake is not None
    working = [f"-DCMAKE_{language}_COMPILER_WORKS=1" for language in ("CXX", "ASM")]
    command = [cmake, "-S", ROOT / "plugins", "-B", tmp_path, "-DCMAKE_SYSTEM_NAME=Windows", *working]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "built on Linux only" in " ".join(done.stderr.split())


@lf.needs_tools
def test_failures_leave_no_library_behind(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(BundleError, match="does not exist"):
        tensorrt_build.build_libraries((90,), tmp_path / "kernels", out)
    lf.write_stand_ins(tmp_path / "kernels", (90,))
    with pytest.raises(BuildError, match=r"failed; the libraries need a C\+\+17 compiler"):
        tensorrt_build.build_libraries(
            (90,), tmp_path / "kernels", out, fetch=False, sanitize="no_such_sanitizer", jobs=1
        )
    assert not list(out.glob("*.so"))


@lf.needs_tools
@pytest.mark.slow
def test_command_line_builds_from_sources_to_a_library(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "plugins", "build", "--tensorrt", "--arch", "sm_120", "--no-fetch"]
    command += ["--out", str(tmp_path / "kernels"), "--tensorrt-out", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "sm_120a" in result.stdout
    library = tmp_path / "out" / tensorrt_build.LAUNCH_LIBRARY
    assert lf.open_library(library).lf_architectures() == b"sm_120a"
    assert library.stat().st_size > 300_000, "the cubins are not inside"
    if lf.tensorrt_root() is None:
        assert "the TensorRT plugin is skipped" in result.stdout
        assert "set TENSORRT_ROOT to a folder" in " ".join(result.stdout.split())
    else:
        assert (tmp_path / "out" / tensorrt_build.PLUGIN_LIBRARY).exists()


def test_nodes_name_the_plugin_and_stay_valid() -> None:
    ir = pytest.importorskip("onnx_ir")
    from plugins import contract
    from plugins.nodes import functions
    from plugins.nodes.tensorrt import name_plugin

    shapes = {
        "qkv": (192, 384),
        "bias": (384,),
        "norm_q": (128,),
        "norm_k": (128,),
        "cos": (192, 32),
        "sin": (192, 32),
    }
    inputs = [ir.val(name, ir.DataType.FLOAT, shape) for name, shape in shapes.items()]
    geometry = {"heads": 2, "frame_tokens": 64, "block_q": 32, "block_k": 32}
    ours = ir.node(
        contract.QK_PREPARE, inputs, {**geometry, "eps": 1e-6}, domain=contract.DOMAIN, num_outputs=5
    )
    theirs = ir.node("Identity", [ours.outputs[0]])
    opsets = {"": functions.OPSET, contract.DOMAIN: contract.VERSION}
    graph = ir.Graph(inputs, theirs.outputs, nodes=[ours, theirs], opset_imports=opsets, name="graph")
    model = ir.Model(graph, ir_version=10)
    assert name_plugin(model) == 1
    assert ours.attributes["plugin_namespace"].value == "lightforcing"
    assert "plugin_namespace" not in theirs.attributes
    assert name_plugin(model) == 1, "marking again changes nothing"
    functions.attach(model)  # accepts the attribute
