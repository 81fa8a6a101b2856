"""The import rules between rooms, and what the command lines may load before they know their arguments."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS: dict[str, set[str]] = {
    "lightforcing_ref": set(),
    "plugins": set(),
    "runtime": set(),
    "serving": {"runtime"},
    "engines": set(),
    "export": {"lightforcing_ref", "plugins", "runtime", "engines"},
    "training": {"lightforcing_ref", "plugins", "runtime", "export"},
}
# What the manifest and its files are, and how golden vectors are drawn and compared: defined on the runtime's side.
FROM_RUNTIME = {"runtime.bundle", "runtime.errors", "runtime.golden", "runtime.weights_file"}
# What looks at finished bundles, or runs them, does it with the runtime's own means.
READS_BUNDLES = {"export/compare.py", "export/inspect.py", "export/reference.py"}
NOT_IN_RUNTIME = {
    "torch",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "transformers",
    "triton",
    "polygraphy",
    "modelopt",
}
# Bundles that PyTorch compiled need PyTorch to run; it is imported when one is loaded.
RUNS_ON_TORCH = {"runtime/inductor.py", "runtime/inductor_cuda.py"}
HEAVY = NOT_IN_RUNTIME | {
    "fastapi",
    "uvicorn",
    "onnxruntime",
    "av",
    "PIL",
    "tokenizers",
    "scipy",
    "tensorrt",
    "tensorrt_rtx",
}
MAX_LINES = 520

SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
LENGTH_CHECKED = sorted(
    path for folder in (*ROOMS, "tests", "tools", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[int, int, str]]:
    """(line, level, dotted name) of every import; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, 0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                (node.lineno, node.level, f"{node.module}.{alias.name}" if node.module else alias.name)
                for alias in node.names
            )


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_rooms_import_one_way(path: Path) -> None:
    name = relative(path)
    room = name.split("/")[0]
    for line, level, module in imports(path):
        top = module.split(".")[0]
        if level or top not in ROOMS:
            continue
        assert top != room, f"{name}:{line}: imports inside a room are relative, found {module}"
        assert top in ROOMS[room], f"{name}:{line}: {room} must not import {module}"
        if (room, top) == ("export", "runtime") and name not in READS_BUNDLES:
            allowed = any(module == part or module.startswith(f"{part}.") for part in FROM_RUNTIME)
            assert allowed, f"{name}:{line}: export takes {FROM_RUNTIME} from the runtime, found {module}"


@pytest.mark.parametrize("path", [p for p in SOURCES if relative(p).startswith("serving/")], ids=relative)
def test_serving_uses_the_public_face_of_the_runtime(path: Path) -> None:
    import runtime

    for line, level, module in imports(path):
        if not level and module.split(".")[0] == "runtime":
            allowed = module.removeprefix("runtime.") in runtime.__all__
            assert allowed, (
                f"{relative(path)}:{line}: serving imports names of runtime.__all__, found {module}"
            )


@pytest.mark.parametrize("path", [p for p in SOURCES if relative(p).startswith("runtime/")], ids=relative)
def test_runtime_needs_no_training_or_export_library(path: Path) -> None:
    barred = NOT_IN_RUNTIME - {"torch"} if relative(path) in RUNS_ON_TORCH else NOT_IN_RUNTIME
    for line, _, module in imports(path):
        assert module.split(".")[0] not in barred, f"{relative(path)}:{line}: imports {module}"


def test_sparsity_arithmetic_has_no_dependencies() -> None:
    for line, level, module in imports(ROOT / "lightforcing_ref/sparsity.py"):
        top = module.split(".")[0]
        assert module.startswith("errors.") if level else top in sys.stdlib_module_names, (
            f"line {line}: {module}"
        )


def test_reference_model_knows_no_onnx() -> None:
    for path in (ROOT / "lightforcing_ref").rglob("*.py"):
        for line, _, module in imports(path):
            assert not module.startswith("onnx"), f"{relative(path)}:{line}: imports {module}"


@pytest.mark.parametrize("path", LENGTH_CHECKED, ids=relative)
def test_files_stay_readable(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{relative(path)} has {lines} lines; split it (limit {MAX_LINES})"


def loaded_modules(code: str) -> set[str]:
    """Top-level names of the modules a fresh interpreter has loaded after `code`."""
    script = f"import sys\n{code}\nprint('|'.join({{name.split('.')[0] for name in sys.modules}}))"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=180
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split("|"))


def test_whole_runtime_loads_without_training_or_export_library() -> None:
    modules = [
        f"runtime.{path.stem}" for path in sorted((ROOT / "runtime").glob("*.py")) if path.stem != "__main__"
    ]
    found = loaded_modules(f"import importlib\nfor name in {modules!r}: importlib.import_module(name)")
    assert "runtime" in found
    assert not found & (NOT_IN_RUNTIME | (set(ROOMS) - {"runtime"}))


@pytest.mark.parametrize(
    "command",
    [
        "export",
        "export build",
        "export compare",
        "export doctor",
        "export plan",
        "runtime",
        "runtime generate",
        "runtime bench",
        "runtime verify",
        "serving",
        "serving run",
    ],
)
def test_help_is_instant(command: str) -> None:
    room, *arguments = command.split()
    code = (
        f"import runpy; sys.argv = ['x', *{[*arguments, '--help']!r}]\n"
        f"try: runpy.run_module({room!r}, run_name='__main__', alter_sys=True)\n"
        f"except SystemExit as stop: assert not stop.code, stop.code"
    )
    assert not loaded_modules(code) & HEAVY


def test_importing_errors_and_plans_is_light() -> None:
    assert not loaded_modules("import export.targets, export.backends, export.doctor, runtime.bundle") & HEAVY
