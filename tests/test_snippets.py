"""What the documents print to be typed: command lines that are accepted, extras that exist, Python that can be read;
and no block without a test that runs it or a reason.
"""

from __future__ import annotations

import argparse
import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from export.cli.main import _parser as export_parser
from runtime.cli.main import build_parser as runtime_parser
from serving.cli import build_parser as serving_parser
from tests import test_snippets_run as executed
from tests.snippets import (
    DOCUMENTS,
    DRAWINGS,
    NOT_RUN,
    NOT_RUN_BLOCKS,
    ROOT,
    SHELL,
    Block,
    blocks,
    commands,
    reason,
    why_not,
)
from tests.structure import ROOMS

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
PARSERS = {"export": export_parser, "runtime": runtime_parser, "serving": serving_parser}
BLOCKS = [block for path in DOCUMENTS for block in blocks(path)]
COMMANDS = [command for path in DOCUMENTS for command in commands(path)]


def ours(text: str) -> str | None:
    """A command line of a room with a parser, as far as a shell's operators; None where places are left open in it."""
    match = re.match(r"python -m (?:export|runtime|serving) ", text)
    if match is None or "..." in text or "$(" in text or "[" in text:
        return None
    return re.sub(r"\s*(?:\||>|&&|&).*$", "", text)


LINES = [(command.block.path, line) for command in COMMANDS if (line := ours(command.text))]


def accept_any_path(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Files that documents name need not be here."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                accept_any_path(sub)
        elif getattr(action.type, "__name__", "") in ("existing", "source", "output", "lora", "lora_source"):
            action.type = str
    return parser


@pytest.mark.parametrize(
    ("path", "command"), LINES, ids=lambda value: value if isinstance(value, str) else value.name
)
def test_command_lines_are_accepted(path: Path, command: str) -> None:
    _, _, room, *arguments = shlex.split(command)
    try:
        accept_any_path(PARSERS[room]()).parse_args(arguments)
    except (SystemExit, Exception) as error:
        if not (isinstance(error, SystemExit) and error.code == 0):
            pytest.fail(f"{path.name}: {command}: {error}")


def test_there_are_commands_to_check() -> None:
    assert len(LINES) > 50
    assert {path.name for path, _ in LINES} >= {"README.md", "models.md", "planning.md", "first_video.md"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_extras_exist(path: Path) -> None:
    for group in re.findall(
        r"(?:'\.|\"\.|\.whl|lightforcing-(?:runtime|deploy))\[([a-z,-]+)\]", path.read_text()
    ):
        assert set(group.split(",")) <= set(EXTRAS), f"{path.name}: {group}"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_python_can_be_read_and_imports_what_is_there(block: Block) -> None:
    """Also of blocks that are not run."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ROOMS:
            exec(compile(ast.Module([node], []), str(block), "exec"), {})


def test_every_block_is_run_or_has_a_reason() -> None:
    for block in BLOCKS:
        if block.language in SHELL | DRAWINGS or why_not(block):
            continue
        assert block.language in ("python", "toml", "c"), (
            f"{block}: say in tests/snippets.py why it is not run"
        )
        assert block in executed.code(block.path)


def test_every_command_is_run_or_has_a_reason() -> None:
    for command in COMMANDS:
        if (why := reason(command.text)) is None:
            room = re.match(r"python -m (\w+) ", command.text)
            known = room is not None and room[1] in executed.MAINS
            assert known, f"{command.block}: {command}: say in tests/snippets.py why it is not run"
        else:
            assert why


def test_no_reason_is_given_for_what_is_not_there() -> None:
    for pattern, why in NOT_RUN:
        first = [next((p for p, _ in NOT_RUN if re.fullmatch(p, command.text)), None) for command in COMMANDS]
        assert pattern in first, f"nothing is not run because it {why}: {pattern}"
    for document, beginning, _ in NOT_RUN_BLOCKS:
        assert any(block.document == document and block.text.startswith(beginning) for block in BLOCKS), (
            document
        )
