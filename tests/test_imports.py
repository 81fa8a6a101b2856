"""The import rules between and inside rooms, and what the command lines may load before they know their arguments."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from tests.structure import circles, place, structure

ROOT = Path(__file__).resolve().parent.parent
ROOMS: dict[str, set[str]] = {
    "lightforcing_ref": set(),
    "plugins": {"runtime"},
    "runtime": set(),
    "serving": {"runtime"},
    "engines": set(),
    "export": {"lightforcing_ref", "plugins", "runtime", "engines"},
    "training": {"lightforcing_ref", "plugins", "runtime", "export"},
}
FLOORS: dict[str, tuple[str, ...]] = {
    "lightforcing_ref": (
        "rolling",
        "checkpoint rollout",
        "cache decoders policies text",
        "fp8_cache model schedule",
        "attention config",
        "dimensions rope shipped sparsity",
        "__init__ errors",
    ),
    "training": (
        "__main__",
        "cli",
        "ship",
        "stages",
        "data forward quantization runner",
        "__init__ attention config device optim",
    ),
    "export": (
        "__main__",
        "__init__ cli",
        "report",
        "build",
        "preflight",
        "estimate",
        "backends backends/inductor backends/tensorrt backends/tensorrt_rtx",
        "compare parts",
        "quantize",
        "graph hub",
        "progress request",
        "errors machine page tolerances units",
    ),
    "runtime": (
        "__main__",
        "__init__ cli",
        "pipeline",
        "verify",
        "backends",
        "cuda session",
        "saved",
        "host scheduler",
        "program rollout text video",
        "engine",
        "bundle noise terminal",
        "errors files frame_table frames host_memory",
    ),
    "serving": (
        "__main__",
        "cli",
        "ray_app server",
        "app",
        "routes transport",
        "service",
        "clips",
        "live",
        "logs metrics neighbours page places security tracing",
        "settings",
        "__init__ errors",
    ),
    "plugins": (
        "__main__ eager",
        "compile nodes",
        "nodes/bodies",
        "maps operators shapes",
        "contract kernels",
        "__init__ errors",
    ),
    "benchmarks": (
        "codes decoders fp4_remedies lease recaches",
        "attention quality rollout serving",
        "__init__ kernel_classes timing",
    ),
}
"""What stands on one floor imports from the floors below only. A place is a folder, or a module at a room's top."""
MODULES_PER_FOLDER = 15
FOUND = structure(ROOT)
FROM_RUNTIME = {
    "plugins": (
        "runtime.bundle",
        "runtime.errors",
        "runtime.files",
        "runtime.host_memory",
        "runtime.terminal",
    )
}
"""Rooms that need less of the runtime than its faces offer: formats of files, and common ground."""
FACES: dict[str, set[str]] = {
    "export": {
        "export",
        "export.quantize",
        # What packages say about themselves, for who times them.
        "export.backends.inductor.generated",
        "export.backends.inductor.packages",
    },
    "runtime": {
        "runtime",
        "runtime.bundle",
        # The formats of a bundle's files, a module each.
        "runtime.bundle.benchmark",
        "runtime.bundle.e4m3",
        "runtime.bundle.golden",
        "runtime.bundle.images",
        "runtime.bundle.policies",
        "runtime.bundle.signature",
        "runtime.bundle.weights_file",
        # What a bundle does on its device, for who takes it apart.
        "runtime.backends",
        "runtime.cuda",
        "runtime.host",
        "runtime.program",
        # Ground that every room stands on.
        "runtime.errors",
        "runtime.files",
        "runtime.host_memory",
        "runtime.noise",
        "runtime.terminal",
        "runtime.verify",
    },
}
"""Packages and modules whose `__all__` is all that other rooms import of a room."""
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
RUNS_ON_TORCH = {"runtime/host/inductor.py", "runtime/cuda/inductor.py"}
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
    room, folder = name.split("/")[0], name.rpartition("/")[0].replace("/", ".")
    for line, level, module in imports(path):
        top = module.split(".")[0]
        assert level < 2, f"{name}:{line}: imports across folders are absolute"
        if level or top not in ROOMS:
            continue
        if top == room:
            source = module.rpartition(".")[0]
            near = source == folder or (
                source.rpartition(".")[0] == folder and f"{source.replace('.', '/')}.py" in FOUND.modules
            )
            assert not near, f"{name}:{line}: imports inside a folder are relative, found {module}"
            continue
        assert top in ROOMS[room], f"{name}:{line}: {room} must not import {module}"
        if top == "runtime":
            assert module.startswith(FROM_RUNTIME.get(room, "runtime")), f"{name}:{line}: {module}"


OUTSIDE = sorted(
    path for folder in (*ROOMS, "benchmarks", "examples", "tools") for path in (ROOT / folder).rglob("*.py")
)


def past_a_face(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import from another room that is not of its public names."""
    for line, level, name in imports(path):
        room, (module, _, imported) = name.split(".")[0], name.rpartition(".")
        if level or room not in FACES or relative(path).startswith(f"{room}/") or name in FACES[room]:
            continue
        if module not in FACES[room] or imported not in import_module(module).__all__:
            yield line, module


@pytest.mark.parametrize("path", OUTSIDE, ids=relative)
def test_other_rooms_take_public_names_only(path: Path) -> None:
    found = list(past_a_face(path))
    assert not found, (
        f"{relative(path)}: {found} is no public name of the room; add it to the face, or do without"
    )


@pytest.mark.parametrize("room", FLOORS)
def test_no_import_runs_up(room: str) -> None:
    heights = {
        f"{room}/{name}".removesuffix("/"): -floor
        for floor, names in enumerate(FLOORS[room])
        for name in names.split()
    }
    for module, imported in FOUND.modules.items():
        if module.split("/")[0] != room:
            continue
        here = place(module)
        assert here in heights, f"{module}: {here} is on no floor of {room}; give it one in FLOORS"
        for other in imported:
            there = place(other)
            if other.split("/")[0] == room and there != here:
                assert heights[there] < heights[here], (
                    f"{module} imports {other}, which is not on a floor below"
                )


@pytest.mark.parametrize("graph", ["modules", "sources"])
def test_nothing_imports_or_includes_in_a_circle(graph: str) -> None:
    assert circles(getattr(FOUND, graph)) == []


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"f"}, "f": {"e"}}) == [
        ["a", "b", "c"],
        ["e", "f"],
    ]


def test_structure_sees_every_way_to_import(tmp_path: Path) -> None:
    files = {
        "export/__init__.py": "",
        "export/a.py": "from .deep import b\ndef f():\n    from export.deep.c import x",
        "export/deep/__init__.py": "from .b import y",
        "export/deep/b.py": "import export.deep.c as c\ny = 1",
        "export/deep/c.py": "from ..a import f\nx = 1",
        "plugins/launch/one.h": '#include "two.h"\n#include <vector>',
        "plugins/launch/two.h": '#  include "one.h"',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = structure(tmp_path)
    assert found.modules["export/a.py"] == {"export/deep/b.py", "export/deep/c.py"}
    assert found.modules["export/deep/b.py"] == {"export/deep/c.py"}
    assert found.modules["export/deep/__init__.py"] == {"export/deep/b.py"}
    assert circles(found.modules) == [["export/a.py", "export/deep/b.py", "export/deep/c.py"]]
    assert found.places()["export/deep"] == {"export/a"}
    assert circles(found.sources) == [["plugins/launch/one.h", "plugins/launch/two.h"]]
    assert found.sizes() == {"export": 1, "export/deep": 2}


def test_folders_stay_small() -> None:
    large = {folder: count for folder, count in FOUND.sizes().items() if count > MODULES_PER_FOLDER}
    assert large == {}, f"more than {MODULES_PER_FOLDER} modules"


def test_no_module_is_named_as_one_of_pythons() -> None:
    shadowing = [module for module in FOUND.modules if Path(module).stem in sys.stdlib_module_names]
    assert shadowing == ["plugins/kernels/select.py"]  # a kernel, named as the operator's step


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
        module.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        for module in FOUND.modules
        if module.startswith("runtime/") and not module.endswith("__main__.py")
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
    assert (
        not loaded_modules(
            "import export.request.targets, export.request.capability, export.report.doctor, runtime.bundle"
        )
        & HEAVY
    )
