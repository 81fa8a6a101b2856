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
