"""Docstrings are of one dialect: Markdown with Google's sections, as the documentation site reads them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("lightforcing_ref", "plugins", "export", "runtime", "serving", "training", "benchmarks", "examples")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
SPHINX = re.compile(r"``|:\w+:`")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of every string that stands alone, behind an attribute too."""
    for node in ast.walk(tree):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value.lineno, value.value


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_docstrings_are_markdown(path: Path) -> None:
    found = [line for line, text in docstrings(ast.parse(path.read_text())) if SPHINX.search(text)]
    assert not found, f"{relative(path)}, lines {found}: write `name`, and no role of Sphinx"


COMMAND_LINES = ("export/cli/", "runtime/cli/", "export/__main__.py", "plugins/__main__.py", "serving/cli.py")
"""Their functions raise for the one line that the user is shown."""
OWN_PROTOCOLS = {"NotImplementedError", "AssertionError", "AttributeError", "KeyError", "StopAsyncIteration"}
"""What Python itself expects of an object."""


def raised(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Names of the exceptions that a function raises itself, anew."""
    names, waiting = set(), list[ast.AST](function.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if isinstance(node, ast.Raise) and node.exc is not None:
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = error.id if isinstance(error, ast.Name) else getattr(error, "attr", "")
            names |= {name} if name[:1].isupper() else set()
        waiting += ast.iter_child_nodes(node)
    return names - OWN_PROTOCOLS


def public_functions(
    body: list[ast.stmt], prefix: str = ""
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield f"{prefix}{node.name}", node


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if not relative(p).startswith(COMMAND_LINES)], ids=relative
)
def test_public_functions_say_what_they_raise(path: Path) -> None:
    for name, function in public_functions(ast.parse(path.read_text()).body):
        section = (ast.get_docstring(function) or "").partition("Raises:")[2]
        missing = sorted(error for error in raised(function) if error not in section)
        assert not missing, f"{relative(path)}: {name} raises {', '.join(missing)}; say when, under Raises:"


def test_what_is_raised_is_read_from_the_syntax() -> None:
    code = "def f():\n if x: raise A('x')\n raise\n def g(): raise B\n try: x\n except C as e: raise e\n raise m.D"
    (_, function), *_ = public_functions(ast.parse(code).body)
    assert raised(function) == {"A", "D"}
