"""The speed ladder on a GPU, with the tiny model: every rung runs, and what is measured is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

NO_GPU = "" if torch.cuda.is_available() else "PyTorch finds no CUDA device"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)]

MISSING_REASON = "the ladder needs a package that is not installed (docs/benchmarks.md)"


@pytest.fixture(autouse=True)
def needed() -> None:
    from benchmarks.rollout.main import NEEDED

    for name in NEEDED:
        pytest.importorskip(name, reason=MISSING_REASON)


@pytest.mark.parametrize(("frame_tokens", "block"), [(1536, 128), (1560, 128), (1560, 64)])
def test_the_plain_kernel_is_gathered_attention(frame_tokens: int, block: int) -> None:
    from benchmarks.rollout.sparse import choose_blocks, gathered_attention, pool_blocks
    from benchmarks.rollout.sparse_kernel import block_attention
    from lightforcing_ref.cache import AttentionSpec
    from lightforcing_ref.sparsity import BlockGeometry, HSAConfig

    spec = AttentionSpec(
        2, BlockGeometry(frame_tokens, block, block), HSAConfig(6, 1, 2), (1 << 20, 150_000), 128**-0.5
    )
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(n * frame_tokens, 2, 128, generator=generator, device="cuda", dtype=torch.bfloat16)
        for n in (3, 12, 12)
    )
    chosen = choose_blocks(
        pool_blocks(q, frame_tokens, block), pool_blocks(k, frame_tokens, block), 9, 1, spec
    )
    found = block_attention(q, k, v, chosen, frame_tokens, block, block, spec.scale).double()
    wanted = gathered_attention(q.float(), k.float(), v.float(), chosen, spec).double()
    assert float((found - wanted).norm() / wanted.norm()) < 1e-2


def test_every_sdpa_backend_is_tried() -> None:
    from benchmarks.rollout.eager import fastest_sdpa
    from benchmarks.rollout.ladder import BundleSpec, Case, Platform
    from export.request.targets import load_target

    platform = Platform("cuda", load_target("h200"), "inductor", "bf16")
    plan = BundleSpec("bf16", False, True).request(Case("tiny", 128, 128, 81), platform, "unused").plan
    choice = fastest_sdpa(plan, "cuda", torch.bfloat16)
    assert len(choice.microseconds) == 3
    assert isinstance(choice.microseconds[choice.name], float), choice.microseconds


def test_the_ladder_with_the_tiny_model(tmp_path: Path) -> None:
    from benchmarks.rollout import main as rollout

    status = rollout.main(
        [
            *(
                "--preset",
                "tiny",
                "--device",
                "cuda",
                "--frames",
                "45",
                "--repeats",
                "2",
                "--flat-chunks",
                "0",
            ),
            *("--out", str(tmp_path), "--bundles", str(tmp_path / "bundles")),
        ]
    )
    assert status == 0
    (file,) = tmp_path.glob("rollout-*.json")
    rows = {row["number"]: row for row in json.loads(file.read_text())["cases"][0]["rungs"]}
    for number in (0, 1):
        row = rows[number]
        assert row["status"] == "measured", row["reason"]
        assert row["memory"]["torch_bytes"] > 0
        inspection = row["inspection"]
        assert sum(inspection["shares"].values()) == pytest.approx(1)
        assert inspection["shares"]["conv"] > 0
        assert inspection["kernels"] > 100
        assert sum(inspection["host_syncs"].values()) >= 1, inspection
    assert rows[0]["inspection"]["shares"]["attention"] > 0
    assert rows[1]["inspection"]["shares"]["selection"] > 0
    unavailable = {n: row["reason"] for n, row in rows.items() if row["status"] == "skipped"}
    for number in range(2, 7):
        assert number in unavailable or rows[number]["status"] == "measured", rows[number]["reason"]
    if 6 in unavailable:
        pytest.skip(f"rungs 0 and 1 ran; rung 6: {unavailable[6]}")
    inspection = rows[6]["inspection"]
    assert inspection["shares"]["attention"] > 0
    assert all(inspection["parts"][part] > 0 for part in ("first", "layer", "last", "operators", "decoder"))
