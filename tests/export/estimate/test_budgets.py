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
