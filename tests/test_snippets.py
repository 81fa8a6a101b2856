"""What the documents print to be typed: command lines that are accepted, extras that exist, Python that runs."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from export.cli.main import _parser as export_parser
from export.cli.main import main as export_main
from runtime.cli.main import build_parser as runtime_parser
from serving.cli import build_parser as serving_parser
from tests.runtime import handmade

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
PARSERS = {"export": export_parser, "runtime": runtime_parser, "serving": serving_parser}
ABOUT_OTHERS = {"inference_py.md"}
"""Its Python goes into the published scripts."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def commands(text: str) -> Iterator[str]:
    """Command lines of ours in code blocks, joined, without what is said behind them."""
    joined = re.sub(r"\\\n\s*", "", text)
    for line in joined.splitlines():
        match = re.match(r"^(?:    |\$ )?(python -m (?:export|runtime|serving) .*)$", line)
        if match:
            command = re.split(r"\s+#\s|\s{4,}(?=[a-z])|\s{2,}(?=\()", match[1])[0].strip()
            if "..." not in command and "$(" not in command and "[" not in command:
                yield re.sub(r"\s*(?:\||>|&&|&).*$", "", command)


def blocks(text: str) -> Iterator[str]:
    yield from re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


LINES = [(path, command) for path in DOCUMENTS for command in commands(path.read_text())]
PYTHON = [(path, block) for path in DOCUMENTS for block in blocks(path.read_text())]


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
            pytest.fail(f"{name_of(path)}: {command}: {error}")


def test_there_are_commands_to_check() -> None:
    assert len(LINES) > 50
    assert {path.name for path, _ in LINES} >= {"README.md", "models.md", "planning.md", "first_video.md"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_extras_exist(path: Path) -> None:
    for group in re.findall(
        r"(?:'\.|\"\.|\.whl|lightforcing-(?:runtime|deploy))\[([a-z,-]+)\]", path.read_text()
    ):
        assert set(group.split(",")) <= set(EXTRAS), f"{name_of(path)}: {group}"


@pytest.mark.parametrize(
    ("path", "block"), PYTHON, ids=lambda value: value.name if isinstance(value, Path) else ""
)
def test_python_can_be_read_and_imports_what_is_there(path: Path, block: str) -> None:
    tree = ast.parse(block)
    if path.name in ABOUT_OTHERS:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in (
            "runtime",
            "export",
            "serving",
        ):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name), f"{name_of(path)}: {node.module}.{alias.name}"


@pytest.mark.parametrize("name", ["README.md", "docs/embedding.md"])
def test_python_of_the_first_pages_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a small bundle in the place of the demo's, one block after the other, as a reader pastes them."""
    handmade.build_bundle(tmp_path / "engines/built/demo")
    monkeypatch.chdir(tmp_path)
    shown: list[object] = []
    space: dict[str, object] = {"show": shown.append, "__name__": "snippets"}
    found = list(blocks((ROOT / name).read_text()))
    assert found
    for block in found:
        exec(compile(block, name, "exec"), space)
    assert shown


@pytest.mark.parametrize("command", ["python -m export models", "python -m export targets"])
def test_lists_that_documents_begin_with_are_printed(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert any(line == command for _, line in LINES)
    assert export_main(shlex.split(command)[3:]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", sorted({line for _, line in LINES if re.match(r"python -m export (?:plan|models) ", line)})
)
def test_plans_in_documents_run(command: str) -> None:
    """Those that need no bundle and no file; exit code 1 says that it does not fit, which some are to show."""
    arguments = shlex.split(command)[3:]
    if {"--bundle", "--measured", "--fetch", "auto"} & set(arguments):
        pytest.skip("needs a file, the network or a GPU")
    assert export_main(arguments) in (0, 1)
