"""Every name of TensorRT's bindings that our code touches exists in the release it is for.

The bindings are the vendor's own; the libraries behind them, which are not on every machine, are stubs compiled here.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.export.backends.trt_names import names_of, touched

ROOT = Path(__file__).parents[3]
STUBS = ROOT / "tests" / "stubs"
LIBRARIES = ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11")
COMPILER = shutil.which("cc") or shutil.which("gcc")
SOURCES = sorted(
    path
    for room in ("export", "runtime", "plugins", "benchmarks", "tools")
    for path in (ROOT / room).rglob("*.py")
    if "tensorrt" in path.read_text(encoding="utf-8")
)
TOUCHED = touched(SOURCES, ROOT)
SHARED = "runtime/cuda/tensorrt.py"
"""Imports neither library and is handed objects of both."""


def missing(module: str, names: list[str], libraries: Path | None = None) -> tuple[str, list[str]]:
    """(version, those of `names` that the bindings lack), asked in a process of its own."""
    paths = [str(libraries), os.environ.get("LD_LIBRARY_PATH", "")] if libraries else []
    result = subprocess.run(
        [sys.executable, STUBS / "names.py", module],
        input=json.dumps(names),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths))} if paths else None,
    )
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    return answer["version"], answer["missing"]


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip("the TensorRT bindings (tensorrt-cu13-bindings) are not installed")
    if COMPILER is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("tensorrt")
    for library in LIBRARIES:
        command = [COMPILER, "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", folder / library]
        subprocess.run([*command, STUBS / "tensorrt_stub.c"], check=True)
    return folder


def test_every_name_is_in_the_bindings_of_tensorrt(stubs: Path) -> None:
    found = TOUCHED["tensorrt"]
    assert {"export/backends/tensorrt/worker.py", "runtime/cuda/tensorrt_classic.py", SHARED} <= set(found)
    assert {"IExecutionContext.execute_async_v3", "ICudaEngine.device_memory_size_v2"} <= found[SHARED]
    names = sorted(set().union(*found.values()))
    assert {"OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE", "IPluginRegistry.load_library"} <= set(names)
    assert {"IProgressMonitor.step_complete", "ICudaEngine.get_tensor_mode"} <= set(names)
    version, absent = missing("tensorrt_bindings", names, stubs)
    assert version.split(".")[0] == "11"
    assert absent == [], f"TensorRT {version} has no {absent}; they are used in {found}"


def test_names_that_tensorrt_does_not_have_are_found(stubs: Path) -> None:
    """Made up, or removed in release 11."""
    wrong = [
        "BuilderFlag.FP16",
        "IInt8Calibrator",
        "ICudaEngine.device_memory_size",
        "IPluginRegistry.load_librarian",
    ]
    right = ["BuilderFlag.REFIT", "Logger.WARNING"]
    assert missing("tensorrt_bindings", [*wrong, *right], stubs)[1] == wrong


def test_every_name_is_in_tensorrt_rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    found = TOUCHED["tensorrt_rtx"]
    assert {"export/backends/tensorrt_rtx/worker.py", "runtime/cuda/tensorrt_rtx.py", SHARED} <= set(found)
    assert found[SHARED] == TOUCHED["tensorrt"][SHARED]
    names = sorted(set().union(*found.values()))
    assert {"IExecutionContext.execute_async_v3", "BuilderFlag.REQUIRE_USER_ALLOCATION"} <= set(names)
    version, absent = missing("tensorrt_rtx", names)
    assert absent == [], f"TensorRT-RTX {version} has no {absent}; they are used in {found}"
    assert missing("tensorrt_rtx", ["BuilderFlag.MADE_UP", "Runtime"])[1] == ["BuilderFlag.MADE_UP"]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import tensorrt as trt\nx = trt.A.B", {"A", "A.B"}),
        (
            "def f():\n import tensorrt as trt\n r = trt.get_plugin_registry()\n r.load()",
            {"IPluginRegistry.load"},
        ),
        ("import tensorrt as trt\nclass C:\n def f(self):\n  self._trt.Q.Z\n", {"Q.Z"}),
        ("import tensorrt as trt\ndef f(engine):\n return engine.size", {"ICudaEngine.size"}),
        ("import tensorrt as trt\nclass M(trt.ILogger):\n def log(self): pass", {"ILogger.log"}),
        ("import tensorrt as trt\ne = EngineFromBytes(b)()\ne.name", {"ICudaEngine.name"}),
        ("import tensorrt as trt\nb, c = trt.Builder(l), 3\nb.build()", {"Builder.build"}),
    ],
)
def test_names_are_read_from_the_syntax(code: str, expected: set[str]) -> None:
    module, names = names_of(code)
    assert module == "tensorrt"
    assert expected <= names


@pytest.mark.parametrize(
    "code", ["from tensorrt import Builder", "import tensorrt", "import tensorrt_rtx as rt"]
)
def test_imports_that_would_escape_the_check_are_refused(code: str) -> None:
    with pytest.raises(AssertionError, match="as trt"):
        names_of(code)


def test_names_of_what_both_import_count_for_both(tmp_path: Path) -> None:
    files = {
        "room/one.py": "import tensorrt as trt\nfrom .between import g\nfrom .two import other\n",
        "room/two.py": "def f():\n import tensorrt_rtx as trt\n from other import shared\n trt.Two\n",
        "room/between.py": "import other.shared\n",
        "other/shared.py": "def f(context):\n context.run()\n",
        "room/apart.py": "def f(context):\n context.walk()\n",
    }
    for name, code in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code)
    assert touched(map(tmp_path.joinpath, files), tmp_path) == {
        "tensorrt": {"other/shared.py": {"IExecutionContext.run"}},
        "tensorrt_rtx": {"room/two.py": {"Two"}, "other/shared.py": {"IExecutionContext.run"}},
    }


def polygraphy_calls(path: Path) -> list[tuple[str, set[str]]]:
    """Classes of Polygraphy that a source imports, with the keywords that it calls them with."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("polygraphy")
        for alias in node.names
    }
    calls = [(name, set[str]()) for name in imported]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in imported:
            calls.append((node.func.id, {keyword.arg or "" for keyword in node.keywords}))
    return [(f"{imported[name]}.{name}", keywords) for name, keywords in calls]


def test_polygraphy_has_the_loaders_and_their_arguments() -> None:
    calls = polygraphy_calls(ROOT / "export" / "backends" / "tensorrt" / "worker.py")
    assert {"flags", "strongly_typed"} in [keywords for _, keywords in calls]
    for name, keywords in calls:
        module, _, attribute = name.rpartition(".")
        loader: Any = getattr(importlib.import_module(module), attribute)
        assert keywords <= accepted(loader), f"{name} takes no {keywords - accepted(loader)}"


def accepted(loader: Any) -> set[str]:
    """Keywords that a class takes, those of its bases included where it passes them on."""
    names: set[str] = set()
    for kind in loader.__mro__:
        if "__init__" in vars(kind):
            parameters = inspect.signature(vars(kind)["__init__"]).parameters.values()
            names |= {parameter.name for parameter in parameters}
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
                break
    return names
