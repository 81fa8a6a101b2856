"""The lock: within the bounds, complete, with hashes of everything and the address of nothing; and pip holds to it."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.setup_env import LOCKED

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TEXT = (ROOT / "tools/lock.txt").read_text()
NOT_LOCKED = {"torch"}
"""From an index of its own, with another hash in each: tools/install_torch.py pins its version."""


def entries() -> dict[str, tuple[Requirement, list[str]]]:
    """What is locked, by name, with its hashes."""
    lines = "\n".join(line for line in TEXT.splitlines() if not line.startswith("#")).replace("\\\n", "")
    found: dict[str, tuple[Requirement, list[str]]] = {}
    for line in filter(None, lines.splitlines()):
        text, *hashes = re.split(r"\s+--hash=sha256:", line.strip())
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        assert name not in found, f"{name} is locked twice"
        found[name] = requirement, hashes
    return found


LOCK = entries()


def version(name: str) -> str:
    (specifier,) = LOCK[name][0].specifier
    assert specifier.operator == "==", name
    return str(specifier.version)


def test_everything_has_hashes_and_nothing_an_address() -> None:
    assert len(LOCK) > 100
    for name, (requirement, hashes) in LOCK.items():
        assert requirement.url is None and version(name)
        assert hashes and all(re.fullmatch("[0-9a-f]{64}", digest) for digest in hashes), name
        assert len(set(hashes)) == len(hashes), name
    assert not re.search(r"://|--(extra-)?index|--find-links|--trusted| @ |file:|/simple", TEXT)


def test_it_is_what_the_project_asks_for() -> None:
    match = re.search(r"^EXTRAS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert match is not None
    texts = [
        *PROJECT["dependencies"],
        *(text for extra in match[1].split(",") for text in PROJECT["optional-dependencies"][extra]),
    ]
    for requirement in map(Requirement, texts):
        name = canonicalize_name(requirement.name)
        if name in NOT_LOCKED:
            continue
        if requirement.marker is not None and name not in LOCK:
            continue  # of systems whose installers take another; see below for this one
        assert requirement.specifier.contains(version(name)), f"{requirement}, locked is {version(name)}"


@pytest.mark.parametrize("system", [("linux", "Linux"), ("darwin", "Darwin"), ("win32", "Windows")], ids=str)
def test_nothing_that_is_needed_is_left_out(system: tuple[str, str]) -> None:
    """Of what is installed here as it is locked, every requirement is locked, and fits: `--no-deps` leaves none out."""
    here = default_environment() | {"sys_platform": system[0], "platform_system": system[1], "extra": ""}
    checked = 0
    for name in LOCK:
        try:
            installed = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if installed.version != version(name):
            continue
        for needed in map(Requirement, installed.requires or []):
            if needed.marker is not None and not needed.marker.evaluate(here):
                continue
            other = canonicalize_name(needed.name)
            if other not in NOT_LOCKED:
                assert other in LOCK, f"{name} needs {needed}"
                assert needed.specifier.contains(version(other), prereleases=True), f"{name} needs {needed}"
        checked += 1
    assert checked > 50


def test_what_the_project_is_built_with_is_locked() -> None:
    from hatchling.build import get_requires_for_build_editable

    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    for needed in map(Requirement, [*build, *get_requires_for_build_editable()]):
        assert needed.specifier.contains(version(canonicalize_name(needed.name))), needed


def wheel(folder: Path, content: str) -> str:
    """A wheel of the package `held`; its SHA-256."""
    path = folder / "held-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("held.py", content)
        archive.writestr("held-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: held\nVersion: 1.0\n")
        archive.writestr(
            "held-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("held-1.0.dist-info/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_pip_takes_the_file_that_is_locked_and_no_other(tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text(f"held==1.0 --hash=sha256:{wheel(tmp_path, 'published = True')}\n")

    def install(target: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "pip",
            "--isolated",
            "install",
            "-q",
            *LOCKED,
            "--requirement",
            str(lock),
        ]
        options = ["--no-index", "--find-links", str(tmp_path), "--target", str(tmp_path / target)]
        return subprocess.run([*command, *options], capture_output=True, text=True, check=False)

    assert install("good").returncode == 0
    assert (tmp_path / "good" / "held.py").read_text() == "published = True"
    wheel(tmp_path, "published = False")
    refused = install("bad")
    assert refused.returncode and "DO NOT MATCH THE HASHES" in refused.stderr
    assert not (tmp_path / "bad" / "held.py").exists()
