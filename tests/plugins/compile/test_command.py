"""`python -m plugins build`, as far as it goes without compiling."""

from __future__ import annotations

from pathlib import Path

import pytest

from plugins.__main__ import main


@pytest.mark.parametrize("archs", ["sm_99", "sm_90,sm_91", ""])
def test_unknown_architectures_are_refused_before_anything_is_written(
    archs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kernels"
    assert main(["build", "--arch", archs, "--out", str(out), "--cache", str(tmp_path / "cache")]) == 2
    said = " ".join("".join(capsys.readouterr()).split())
    assert "unknown architecture" in said and "sm_80, sm_86, sm_89, sm_90, sm_100, sm_120" in said
    assert list(tmp_path.iterdir()) == []
