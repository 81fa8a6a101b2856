"""The documentation site, the changelog, and what the documents say about the code."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.structure import ROOMS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NO_NETWORK = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}


def test_the_site_builds_strictly_and_without_network(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, **NO_NETWORK, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "api" / "runtime" / "index.html").read_text()
    assert "Load a bundle for up to" in reference
    assert 'class="mermaid"' in (tmp_path / "architecture" / "index.html").read_text()
    for page in tmp_path.rglob("*.html"):
        assert "fonts.googleapis" not in page.read_text(), page


def test_every_document_is_on_the_site() -> None:
    navigation = re.findall(r": ([\w/]+\.md)", (ROOT / "mkdocs.yml").read_text())
    assert sorted(navigation) == sorted(
        path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")
    )


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_that_documents_name_exist(path: Path) -> None:
    text = path.read_text()
    rooms = "|".join((*ROOMS, "tests", "tools", "examples", "docs"))
    for name in re.findall(rf"`((?:{rooms})/[\w/.]+\.(?:py|md|cpp|h|toml|cu))`", text):
        assert (ROOT / name).is_file(), f"{path.name} names {name}"
    for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (path.parent / link).exists(), f"{path.name} links to {link}"


def test_readme_has_a_row_for_every_room() -> None:
    readme = (ROOT / "README.md").read_text()
    for room in ROOMS:
        assert f"| `{room}/` |" in readme, room


def test_the_workflow_runs_what_a_change_must_pass() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    commands = {
        name: [step["run"] for step in job["steps"] if "run" in step]
        for name, job in workflow["jobs"].items()
    }
    assert ".ci/run" in commands["test"]
    assert any("mkdocs build --strict" in command for command in commands["docs"])
    assert any("tools/build_wheels.py" in command for command in commands["package"])


def test_issue_forms_are_complete() -> None:
    forms = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    assert forms
    for form in forms:
        content = yaml.safe_load(form.read_text())
        assert {"name", "description", "body"} <= content.keys(), form.name
        assert len({field["id"] for field in content["body"]}) == len(content["body"])


def test_changelog_begins_with_what_is_not_released() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    fallback = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["version"]
    assert headings[-1] == fallback["fallback-version"]


REPORTED = re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "docs" / "reliability.md").read_text())


def test_what_was_reported_has_tests() -> None:
    assert len(REPORTED) >= 13


@pytest.mark.parametrize(("path", "name"), REPORTED, ids=[name for _, name in REPORTED])
def test_a_test_that_a_document_names_runs_every_time(path: str, name: str) -> None:
    tree = ast.parse((ROOT / "tests" / path).read_text(encoding="utf-8"))
    (found,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    marks = {ast.unparse(decorator) for decorator in found.decorator_list}
    assert not marks & {"pytest.mark.slow", "pytest.mark.gpu"}
