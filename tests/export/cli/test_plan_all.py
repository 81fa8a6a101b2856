"""`plan --all`: every GPU in one table."""

from __future__ import annotations

import json

import pytest

from export.cli.main import main
from export.request.targets import list_targets


def test_every_gpu_is_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--all", "--preset", "wan-1.3b", "--precision", "fp8", "--json"]) == 0
    rows = {row["gpu"]: row for row in json.loads(capsys.readouterr().out)}
    targets = {target.name: target for target in list_targets() if target.compute_capability}
    assert rows.keys() == targets.keys()
    for name, row in rows.items():
        assert (row["precision"] is None) == ("fp8" not in targets[name].precisions)
        if row["precision"] is not None:
            assert row["fits"] == (row["peak_bytes"] <= targets[name].memory_gib * 2**30)
    assert not rows["rtx4060"]["fits"]
    assert rows["rtx5090"]["fits"]
    assert rows["rtx5090"]["fps_floor"] > rows["rtx4090"]["fps_floor"] > rows["rtx4070"]["fps_floor"] > 0
    assert rows["rtx5090"]["fps"] == pytest.approx(0.6 * rows["rtx5090"]["fps_floor"])
    assert rows["rtxpro6000-maxq"]["fps"] is None


def test_it_is_about_all_or_about_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--all", "--bundle", "pyproject.toml"]) == 2
    assert "--all is about every GPU" in capsys.readouterr().err
