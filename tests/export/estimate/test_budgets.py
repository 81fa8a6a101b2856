"""How many key blocks a plan counts: where a variant keeps everything, and for the length that is planned."""

from __future__ import annotations

import json
from typing import Any

import pytest

from export.cli.main import main
from export.estimate.roofline import Workload
from export.request.plan import PlanRequest
from export.request.targets import load_target, load_variant
from lightforcing_ref.config import preset


def chunks(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    """The predicted chunks of `wan-1.3b` on an RTX 5090: 24 blocks a frame."""
    assert main(["plan", "--gpu", "rtx5090", "--preset", "wan-1.3b", "--json", *arguments]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["prediction"]["chunks"]
    return found


def test_a_budget_beyond_the_kept_frames_is_spent_all_the_same() -> None:
    """One frame kept of many, and 9 in 10 blocks: 453 of 504."""
    variant = load_variant("short").changed(target=0.1, base=0.1, keep_frames=1, sink_frames=0, near_frames=0)
    workload = Workload(PlanRequest(load_target("rtx5090"), variant, preset("wan-1.3b"), 512, 768, "bf16"))
    assert workload.visible_blocks(6) == (453, 21 * 24)


def test_sparsity_0_is_dense(capsys: pytest.CaptureFixture[str]) -> None:
    found = [
        (chunk["kept"], chunk["total"]) for chunk in chunks(capsys, "--variant", "short", "--sparsity", "0")
    ]
    assert found == [(72 * n, 72 * n) for n in range(1, 8)]


def test_the_table_follows_the_planned_length(capsys: pytest.CaptureFixture[str]) -> None:
    """81 frames are 7 chunks of the long variant, and then the published row of 21 latent frames."""
    planned = chunks(capsys, "--variant", "long", "--frames", "81")
    sparsities = [1 - chunk["kept"] / chunk["total"] for chunk in planned]
    assert sparsities == pytest.approx((0, 0.803, 0.830, 0.846, 0.857, 0.865, 0.871), abs=1 / 144)
    assert len(chunks(capsys, "--variant", "long")) == 21


def test_methods_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: published budgets; windows of 5 frames, 3 of 4 rows and 3 of 6 columns of tiles; 1 - sqrt(1 - 0.25)."""
    arguments = ["plan", "--gpu", "rtx5090,h200", "--preset", "wan-1.3b", "--precision", "bf16", "--json"]
    assert main([*arguments, "--policies", "all"]) == 0
    rows = {row["policy"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == {"hsa", "dense", "sla", "sparge", "sta", "radial", "vmoba", "pbsa"}
    assert rows["hsa"]["seen"] == rows["sla"]["seen"] == rows["sparge"]["seen"] == pytest.approx(230 / 1944)
    assert rows["dense"]["seen"] == 1
    assert rows["sta"]["seen_last"] == pytest.approx(5 / 21 * 3 / 4 * 3 / 6, abs=1 / 504)
    assert rows["vmoba"]["seen_last"] == pytest.approx(0.134, abs=1 / 504)
    assert {name for name, row in rows.items() if row["assumption"]} == {"vmoba"}
    assert [on["target"] for on in rows["hsa"]["targets"]] == ["rtx5090", "h200"]
    for row in rows.values():
        times = [on["attention_seconds"] for on in row["targets"]]
        dense = [on["attention_seconds"] for on in rows["dense"]["targets"]]
        assert all(time <= most for time, most in zip(times, dense, strict=True))
    assert main([*arguments, "--policies", "hsa", "--all"]) == 2
    assert "drop one of them" in capsys.readouterr().err
