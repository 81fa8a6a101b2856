"""The messages of docs/troubleshooting.md are those that the code prints."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.structure import ROOMS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
ROWS = re.findall(r"^\| (`.+?) \|", PAGE.read_text(), re.MULTILINE)
MESSAGES = [message for row in ROWS for message in re.findall(r"`([^`]+)`", row)]


def literals(path: Path) -> Iterator[str]:
    """The strings of a module, adjacent ones joined; what is filled in is an ellipsis."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


PRINTED = [text for room in ROOMS for path in (ROOT / room).rglob("*.py") for text in literals(path)] + [
    (ROOT / "Makefile").read_text()
]


def test_there_are_messages() -> None:
    assert len(MESSAGES) > 20


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_printed_so(message: str) -> None:
    wanted = ".*".join(re.escape(part) for part in message.split("..."))
    assert any(re.search(wanted, text, re.DOTALL) for text in PRINTED)


def test_a_message_that_nobody_prints_would_be_found() -> None:
    with pytest.raises(AssertionError):
        test_a_message_is_printed_so("the engine is tired of ... GPUs")
