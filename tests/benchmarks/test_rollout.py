"""The ladder as a whole: what it runs, what it records, and that nothing that fails takes the rest with it."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from benchmarks.rollout import ladder
from benchmarks.rollout import main as rollout
from benchmarks.rollout.ladder import LADDER, BundleSpec, Case, Platform, bundle_spec, chunks_for
from benchmarks.rollout.measure import MARK, ChunkRecord, Clip, inspect_trace, summarise
from benchmarks.rollout.report import goals, table
from export.request.targets import load_target

ROOT = Path(__file__).parents[2]


# ---- the ladder ----


@pytest.mark.parametrize(("frames", "chunks"), [(1, 1), (9, 1), (10, 2), (21, 2), (81, 7), (243, 21)])
def test_whole_chunks(frames: int, chunks: int) -> None:
    assert chunks_for(frames) == chunks


def test_each_rung_adds_something() -> None:
    features = ("sparse", "fp8", "light_vae", "overlap", "graphs")
    executor = LADDER[2:]
    assert [rung.number for rung in LADDER] == list(range(7))
    for lower, upper in itertools.pairwise(executor):
        gained = [name for name in features if getattr(upper, name) and not getattr(lower, name)]
        lost = [name for name in features if getattr(lower, name) and not getattr(upper, name)]
        assert gained and not lost


def test_rungs_with_the_same_engines_share_a_bundle() -> None:
    h200 = Platform("cuda", load_target("h200"), "inductor", "bf16")
    specs = [bundle_spec(rung, h200) for rung in LADDER[2:]]
    assert [spec.precision for spec in specs] == ["bf16", "bf16", "fp8", "fp8", "fp8"]
    assert specs[3] == specs[4]
    without_fp8 = Platform("cuda", load_target("a100"), "inductor", "bf16", fp8_problem="no fp8 here")
    assert [bundle_spec(rung, without_fp8).precision for rung in LADDER[2:]] == ["bf16"] * 5


@pytest.mark.parametrize(("frames", "window"), [(81, 21), (243, 12)])
def test_dense_and_sparse_rungs_see_the_same_window(frames: int, window: int) -> None:
    h200 = Platform("cuda", load_target("h200"), "inductor", "bf16")
    case = Case("wan-1.3b", 512, 768, frames)
    dense, sparse = (BundleSpec("bf16", on, True).request(case, h200, "out").plan for on in (False, True))
    assert dense.variant.window_frames == sparse.variant.window_frames == window
    assert dense.geometry == sparse.geometry
    assert dense.geometry.block_q == 128
    assert set(dense.spec.keep_q20) == {1 << 20}
    assert max(sparse.spec.keep_q20[1:]) < 1 << 20


def test_goal_sizes_come_first_and_decoders_are_the_published_ones() -> None:
    full, light = (ladder.ladder_preset("wan-1.3b", light_vae=on).vae for on in (False, True))
    assert (full.dim, light.dim) == (96, 24)


# ---- measures ----


def event(cat: str, name: str, ts: float, dur: float) -> dict[str, Any]:
    return {"cat": cat, "name": name, "ts": ts, "dur": dur}


def test_a_trace_gives_shares_waits_and_gaps() -> None:
    found = inspect_trace(
        [
            event("user_annotation", "lightforcing measured chunk", 100.0, 200.0),
            event("kernel", "nvjet_gemm", 90.0, 5.0),  # before the chunk
            event("kernel", "nvjet_gemm", 110.0, 60.0),
            event("kernel", "attend", 171.0, 20.0),
            event("kernel", "attend", 180.0, 20.0),  # beside it, on another stream
            event("gpu_memcpy", "Memcpy DtoH", 240.0, 60.0),
            event("cuda_sync", "Event Sync", 210.0, 40.0),
            event("cuda_sync", "Stream Wait Event", 211.0, 1.0),  # the device waits, not the host
            event("cuda_sync", "Stream Sync", 320.0, 1.0),
            event("cpu_op", "aten::mm", 110.0, 50.0),
        ],
        5,
    )
    assert found.shares is not None
    assert found.shares["gemm"] == pytest.approx(60 / 160)
    assert found.shares["attention"] == pytest.approx(40 / 160)
    assert found.shares["copy"] == pytest.approx(60 / 160)
    assert found.host_syncs == {"Event Sync": 1}
    assert (found.kernels, found.parts) == (4, None)
    assert found.idle_percent == pytest.approx(100 * (10 + 1 + 40) / 200)
    assert found.host_gap_percent == pytest.approx(100 * 40 / 200)


def test_parts_of_a_stretch_that_cuts_a_forward() -> None:
    """The copies that feed the forward, by which its first package is known, come before the mark."""
    names = (
        "Memcpy HtoD",
        "patches",
        "prepare",
        "attend",
        "layer_a",
        "prepare",
        "attend",
        "last",
        "patches",
        "prepare",
    )
    kernels = [event("kernel", name, 100.0 + 10 * index, 10.0) for index, name in enumerate(names)]
    found = inspect_trace([event("user_annotation", MARK, 125.0, 75.0), *kernels], 5)
    assert found.parts is not None
    assert {part: round(7 * share) for part, share in found.parts.items()} == {
        "first": 1, "layer": 1, "last": 1, "operators": 4, "decoder": 0, "copies": 0,
    }  # fmt: skip


def test_medians_over_clips() -> None:
    def clip(*delivered: float) -> Clip:
        return Clip(delivered, tuple(ChunkRecord(9, 0.7, 0.2, 0.1) for _ in delivered))

    found = summarise([clip(1.0, 3.0), clip(2.0, 5.0), clip(1.5, 9.0)])
    assert (found["latency_s"], found["first_frames_s"]) == (5.0, 1.5)
    assert found["chunk_s"] == [1.5, 3.0]
    assert found["fps"] == pytest.approx(18 / 5)
    assert found["runtime_percent"] == pytest.approx(10)


def measured(**changes: Any) -> dict[str, Any]:
    figures = {"latency_s": 0.7, "ratio_to_rung_0": 6.0, "first_frames_s": 0.2, "overhead_percent": 0.5}
    return {"number": 6, "name": "last", "status": "measured", **figures, **changes}


def case_with(rung: Mapping[str, Any], preset: str, frames: int) -> dict[str, Any]:
    return {"preset": preset, "height": 512, "width": 768, "asked_frames": frames, "rungs": [rung]}


def test_goals_count_on_the_device_they_were_set_for() -> None:
    cases = [case_with(measured(), "wan-1.3b", 81)]
    cases.append(case_with(measured(flatness={"drift_percent": -1.5}), "wan-1.3b", 243))
    status = {goal["goal"]: goal["status"] for goal in goals(cases, "NVIDIA H200")}
    assert list(status.values()) == ["met", "met", "not met", "met", "met"]
    assert {goal["status"] for goal in goals(cases, "NVIDIA H100")} == {"unmeasured"}
    lower = [case_with(measured(number=5), "wan-1.3b", 81)]
    assert {goal["status"] for goal in goals(lower, "NVIDIA H200")} == {"unmeasured"}
    assert [goal["figure"] for goal in goals(lower, "NVIDIA H200")] == [0.7, 6.0, 0.2, None, 0.5]


# ---- the command ----


@pytest.fixture
def bundles(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Bundles of rung 3, and of 5 and 6, without building any; a decoder that costs next to nothing in PyTorch."""
    monkeypatch.setattr(ladder, "DECODER_WIDTHS", MappingProxyType({"tiny": (2, 2)}))
    platform = Platform.here("cpu")
    case = Case("tiny", 128, 128, 21)
    for light in (False, True):
        shutil.copytree(tiny_bundle, tmp_path / BundleSpec("fp32", True, light).name(case, platform))
    return tmp_path


def run(out: Path, bundles: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    common = [
        "--device",
        "cpu",
        "--frames",
        "21",
        "--repeats",
        "1",
        "--out",
        str(out),
        "--bundles",
        str(bundles),
    ]
    status = rollout.main([*common, *arguments])
    (file,) = out.glob("rollout-*.json")
    return status, json.loads(file.read_text())


def test_the_ladder_on_a_cpu(bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results"
    status, result = run(out, bundles, "--rungs", "0,1,4,6")
    assert status == 0
    (case,) = result["cases"]
    rows = {row["number"]: row for row in case["rungs"]}
    assert {number: row["status"] for number, row in rows.items()} == {
        0: "measured", 1: "measured", 4: "skipped", 6: "measured",
    }  # fmt: skip
    assert "does not compute in fp8" in rows[4]["reason"]
    assert rows[6]["precision"] == "fp32"
    for number in (0, 1, 6):
        row = rows[number]
        assert (row["frames"], len(row["chunk_s"])) == (21, 2)
        assert row["fps"] == pytest.approx(21 / row["latency_s"])
        assert row["ratio_to_rung_0"] == pytest.approx(rows[0]["latency_s"] / row["latency_s"])
        assert row["memory"]["total_bytes"] >= 0
        assert (row["inspection"]["shares"] is None) == (number > 1)
    assert sum(rows[0]["inspection"]["shares"].values()) == pytest.approx(1)
    assert rows[1]["inspection"]["shares"]["selection"] > 0 or rows[1]["inspection"]["chunk"] == 0
    assert {goal["status"] for goal in result["goals"]} == {"unmeasured"}
    assert result["machine"]["date"] and result["machine"]["device"].endswith("CPU")
    assert len(list(out.glob("*.png"))) == 2
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith("goal: ")
    assert any(line.startswith("6  + overlap and graphs") for line in printed)


def test_what_fails_leaves_the_rest(
    bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bundle that does not load, and one that cannot be built, are reasons in the table."""
    broken = next(bundles.glob("*-full"))
    (broken / "manifest.json").write_text("{}")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    status, result = run(tmp_path / "results", bundles, "--rungs", "2,3,6")
    rows = {row["number"]: row for row in result["cases"][0]["rungs"]}
    assert status == 0
    assert (rows[2]["status"], rows[3]["status"], rows[6]["status"]) == ("skipped", "failed", "measured")
    assert "the build of tiny-onnxruntime-cpu-fp32-128x128-dense-full failed" in rows[2]["reason"]
    assert rows[3]["reason"].startswith("Bundle")
    assert rows[6]["ratio_to_rung_0"] is None
    assert "  rung 3: Bundle" in capsys.readouterr().out


def test_a_spent_budget_is_a_reason(bundles: Path, tmp_path: Path) -> None:
    status, result = run(tmp_path / "results", bundles, "--rungs", "1,6", "--budget-seconds", "0")
    assert status == 1
    assert {row["reason"] for row in result["cases"][0]["rungs"]} == {"the time budget was spent before it"}


def test_long_clips_are_checked_for_flatness(
    bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a short clip in place of a long one: what is recorded, not what it says."""
    monkeypatch.setattr(ladder, "SHORT_FRAMES", 9)
    monkeypatch.setattr(rollout, "FLAT_EARLY", 2)
    long_name = BundleSpec("fp32", True, True).name(Case("tiny", 128, 128, 21), Platform.here("cpu"))
    shutil.copytree(next(bundles.glob("*-light")), bundles / long_name)
    status, result = run(tmp_path / "results", bundles, "--rungs", "6", "--flat-chunks", "5")
    (row,) = result["cases"][0]["rungs"]
    assert status == 0
    assert (row["flatness"]["early"], row["flatness"]["late"], len(row["flatness"]["chunk_s"])) == (2, 3, 5)


def test_inputs_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert rollout.main(["--rungs", "0,7"]) == 2
    message = capsys.readouterr().err
    assert "rungs are 0 to 6" in message
    assert "found --rungs 0,7 --repeats 3 --frames 81,243" in message
    assert rollout.main(["--repeats", "0"]) == 2
    assert rollout.main(["--device", "cpu", "--resolution", "100x128"]) == 2
    assert "multiple of 16" in capsys.readouterr().err
    for option, expected in (
        ("--frames", "no list of whole numbers"),
        ("--resolution", "no list of HEIGHTxWIDTH"),
    ):
        with pytest.raises(SystemExit, match="2"):
            rollout.main([option, "abc"])
        assert expected in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert rollout.main(["--device", "cuda"]) == 1
    assert "--device cpu" in capsys.readouterr().err


def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rollout, "NEEDED", ("numpy", "no_such_package"))
    assert rollout.main([]) == 1
    assert "no_such_package" in capsys.readouterr().err


def test_help_needs_no_heavy_import() -> None:
    program = (
        "import sys; from benchmarks.rollout.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'triton', 'pydantic', 'matplotlib'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout.endswith("[]\n")


def test_table_of_nothing() -> None:
    assert table([], goals([], "CPU")).count("unmeasured") == 5
