"""Which names of TensorRT's Python bindings a source file touches, read from its syntax tree.

Beside `trt.X.Y` these are attributes of objects whose class follows from where they come from (`CLASSES`), and methods
that a subclass of one of the bindings' classes overrides. A file that imports no bindings, but that files with bindings
import, is handed objects of theirs: its names count for the bindings of each of these.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

MODULES = ("tensorrt", "tensorrt_rtx")

CLASSES = {
    "Builder": "Builder",
    "OnnxParser": "OnnxParser",
    "Runtime": "Runtime",
    "create_network": "INetworkDefinition",
    "create_builder_config": "IBuilderConfig",
    "create_runtime_config": "IRuntimeConfig",
    "create_runtime_cache": "IRuntimeCache",
    "create_execution_context": "IExecutionContext",
    "create_engine_inspector": "EngineInspector",
    "deserialize_cuda_engine": "ICudaEngine",
    "get_plugin_registry": "IPluginRegistry",
    "EngineFromBytes": "ICudaEngine",
    "get_error": "ParserError",
    "get_input": "ITensor",
}
"""What calls give, by the last part of what is called."""

PARAMETERS = {"engine": "ICudaEngine", "context": "IExecutionContext", "registry": "IPluginRegistry"}
"""What parameters of these names are."""


def module_of(tree: ast.AST) -> str | None:
    """The module of bindings that is imported as `trt`, anywhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in MODULES:
                    assert alias.asname == "trt", (
                        f"line {node.lineno}: import {alias.name} as trt, so that it is checked"
                    )
                    return alias.name
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module in MODULES:
            raise AssertionError(
                f"line {node.lineno}: import {node.module} as trt, so that its names are checked"
            )
    return None


def _variable(node: ast.AST) -> str | None:
    """`x`, `self.x` and `self._x` are all called x."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr.lstrip("_")
    return None


def _called(node: ast.AST) -> str | None:
    """Last part of the name of what a call calls; of a loader that is called at once, the loader's."""
    if not isinstance(node, ast.Call):
        return None
    function = node.func
    if isinstance(function, ast.Call):
        return _called(function)
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else None


def _assignments(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = zip(target.elts, node.value.elts, strict=True)
            else:
                pairs = iter([(target, node.value)])
            for left, right in pairs:
                name = _variable(left)
                if name is not None:
                    yield name, right


def names_of(source: str) -> tuple[str | None, set[str]]:
    """The bindings' module that `source` imports as `trt`, and the dotted names of bindings that it touches."""
    tree = ast.parse(source)
    names: set[str] = set()
    classes = dict(PARAMETERS)
    for name, value in _assignments(tree):
        if (called := _called(value)) in CLASSES:
            classes[name] = CLASSES[called or ""]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts, root = [node.attr], node.value
            while _variable(root) is None and isinstance(root, ast.Attribute):
                parts.append(root.attr)
                root = root.value
            variable = _variable(root)
            if variable == "trt":
                names.add(".".join(reversed(parts)))
            elif variable in classes:
                names.add(f"{classes[variable]}.{parts[-1]}")
        if isinstance(node, ast.ClassDef):
            bases = [
                base.attr
                for base in node.bases
                if isinstance(base, ast.Attribute) and _variable(base.value) == "trt"
            ]
            names |= {
                f"{base}.{item.name}"
                for base in bases
                for item in node.body
                if isinstance(item, ast.FunctionDef) and not item.name.startswith("_")
            }
    return module_of(tree), names


def imports_of(path: Path, root: Path) -> set[Path]:
    """Files of the repository at `root` that the file `path` imports anything from, anywhere."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            folder = path.relative_to(root).parents[node.level - 1].parts if node.level else ()
            module = ".".join([*folder, *filter(None, [node.module])])
            modules = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        places = [root.joinpath(*module.split(".")) for module in modules]
        candidates = (file for place in places for file in (place.with_suffix(".py"), place / "__init__.py"))
        found |= {file for file in candidates if file.is_file()}
    return found


def touched(sources: Iterable[Path], root: Path) -> dict[str, dict[str, set[str]]]:
    """Names to look for in each module of bindings, by file: those of `sources` that import the module, and every
    file of the repository without bindings that they import, directly or through one another.
    """
    result: dict[str, dict[str, set[str]]] = {module: {} for module in MODULES}
    for source in sources:
        wanted, _ = names_of(source.read_text(encoding="utf-8"))
        if wanted is None:
            continue
        waiting, seen = [source], {source}
        while waiting:
            path = waiting.pop()
            module, names = names_of(path.read_text(encoding="utf-8"))
            if module not in (wanted, None):
                continue  # checked against its own
            if names:
                result[wanted][path.relative_to(root).as_posix()] = names
            new = imports_of(path, root) - seen
            seen |= new
            waiting += new
    return result
