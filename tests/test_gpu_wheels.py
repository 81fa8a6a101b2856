"""The list of wheels for a GPU machine without network."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools import gpu_wheels


def test_the_versions_suit_each_other() -> None:
    pinned = dict(wheel.split("==") for wheel in gpu_wheels.WHEELS)
    for name, version in pinned.items():
        if metadata.version(name) != version:
            continue  # another version's needs say nothing about this one
        for need in map(Requirement, metadata.requires(name) or ()):
            if need.name in pinned and (need.marker is None or need.marker.evaluate({"extra": ""})):
                assert need.specifier.contains(pinned[need.name]), f"{name} needs {need}"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda folder: None, None),
        (lambda folder: (folder / "wcwidth-9-py3-none-any.whl").touch(), "more than one version of wcwidth"),
        (lambda folder: (folder / "ftfy-1-py3-none-any.whl").unlink(), "lacks ftfy"),
    ],
)
def test_what_lies_there_is_checked(tmp_path: Path, change, problem: str | None) -> None:
    for wheel in gpu_wheels.WHEELS:
        name = wheel.split("==")[0].replace("-", "_")
        (tmp_path / f"{name}-1-py3-none-any.whl").write_bytes(b"12")
    change(tmp_path)
    _, found = gpu_wheels.check(tmp_path)
    assert found == problem or (problem is not None and problem in (found or ""))
