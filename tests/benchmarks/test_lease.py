"""The lease: stages that hang, crash or find no time cost only themselves, and what they wrote is kept."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lease.archive import main as archive
from benchmarks.lease.archive import unpack
from benchmarks.lease.clips import kernel_table
from benchmarks.lease.main import main, table
from benchmarks.lease.runner import Lease
from benchmarks.lease.stages import CALLS, Stage, stages_of

ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def run(stages: list[Stage], tmp_path: Path, seconds: float = 60) -> tuple[bool, list[dict[str, Any]]]:
    """Whether all ended well, and what was kept after each stage."""
    kept: list[dict[str, Any]] = []
    lease = Lease(
        stages,
        work=tmp_path / "work",
        build=tmp_path / "build",
        log=tmp_path / "log",
        seconds=seconds,
        write=lambda records: kept.append(json.loads(json.dumps(records))),
        say=lambda line: None,
    )
    return lease.run(), kept


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_stage_that_hangs_costs_only_itself(tmp_path: Path) -> None:
    # It ignores the request to end, and so does the process that it has started.
    hang = (
        "import os, signal, time, pathlib; signal.signal(signal.SIGTERM, signal.SIG_IGN); pid = os.fork();"
        "pid and pathlib.Path('{results}/pid.json').write_text(str(pid)); time.sleep(600)"
    )
    stages = [
        Stage("hangs", python(hang), 1.0, ""),
        Stage("crashes", python("import os, sys; print('before', flush=True); os.abort()"), 20, ""),
        Stage("works", python("open('{results}/a.json', 'w').write('[1]')"), 20, ""),
    ]
    well, kept = run(stages, tmp_path)
    assert not well
    last = kept[-1]
    assert [last[name]["status"] for name in ("hangs", "crashes", "works")] == ["killed", "failed", "done"]
    assert "before" in last["crashes"]["tail"]
    assert last["works"]["results"] == {"a": [1]}
    child = last["hangs"]["results"]["pid"]
    for _ in range(50):
        if not alive(child):
            break
        time.sleep(0.1)
    assert not alive(child), "a process of the stage that was killed is left"
    assert kept[0]["hangs"]["status"] == "killed", "results are kept as they come"
    assert kept[0]["works"]["status"] == "waiting"


def test_a_stage_waits_for_the_background_stage_that_it_needs(tmp_path: Path) -> None:
    slow = "import time; time.sleep(1.5); open('{build}/made', 'w').close()"
    (tmp_path / "build").mkdir()
    stages = [
        Stage("makes", python(slow), 20, "", background=True),
        Stage("beside", python("import pathlib; assert not pathlib.Path('{build}/made').exists()"), 20, ""),
        Stage("after", python("open('{build}/made')"), 20, "", after=("makes",), patience=20),
        Stage("unlucky", python("1"), 20, "", after=("missing",)),
        Stage("missing", python("raise SystemExit(3)"), 20, "", background=True),
    ]
    well, kept = run(stages, tmp_path)
    status = {name: record["status"] for name, record in kept[-1].items()}
    assert status["makes"] == status["beside"] == status["after"] == "done"
    assert status["missing"] == "failed"
    assert status["unlucky"] == "skipped"
    assert not well


def test_stages_share_one_budget(tmp_path: Path) -> None:
    start = time.monotonic()
    sleep = Stage("sleeps", python("import time; time.sleep(60)"), 60, "")
    _, kept = run([sleep, Stage("late", python("1"), 60, "")], tmp_path, seconds=6)
    assert time.monotonic() - start < 12
    assert kept[-1]["sleeps"]["status"] == "killed"
    assert kept[-1]["late"]["status"] == "skipped"


def test_pytest_reports_become_figures(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2, 'one is not two'\n"
        "@pytest.mark.skip(reason='no such thing')\ndef test_not(): pass\n"
    )
    command = (sys.executable, "-m", "pytest", "-q", "--rootdir", str(tmp_path), "-p", "no:cacheprovider")
    stage = Stage("tests", (*command, "--junitxml={results}/tests.xml", str(tmp_path / "test_it.py")), 60, "")
    _, kept = run([stage], tmp_path)
    found = kept[-1]["tests"]["results"]["tests"]
    assert found["passed"] == 1
    assert "one is not two" in found["failed"]["test_bad"]
    assert "no such thing" in found["skipped"]["test_not"]
    assert "1 passed, 1 failed; test_bad" in table(kept[-1])


def test_every_stage_names_what_is_there() -> None:
    for call in CALLS.values():
        assert call.seconds <= 570
        for stage in (*call.cuda, *call.cpu):
            assert stage.decides
            for name in stage.after:
                assert any(other.name == name and other.background for other in (*call.cuda, *call.cpu))
            module = stage.command[stage.command.index("-m") + 1]
            assert importlib.util.find_spec(module), module
            for part in stage.command:
                if part.startswith("tests/"):
                    assert (ROOT / part).is_file(), part


def test_chosen_stages_bring_what_they_wait_for() -> None:
    chosen = stages_of(CALLS["first"], "cuda", ["clips"])
    assert [stage.name for stage in chosen] == ["bundle", "clips"]
    with pytest.raises(ValueError, match="has no stage x on cuda; it has bundle, facts"):
        stages_of(CALLS["first"], "cuda", ["x"])


def test_the_command_line_runs_a_stage_and_says_what_is_wrong(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--device", "cpu", "--build", str(tmp_path / "build"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--stages", "facts"]) == 0
    result = json.loads((tmp_path / "out/lease-first.json").read_text())
    facts = result["stages"]["facts"]["results"]["facts"]
    assert facts["copy_tb_s"] > 0
    assert facts["machine"]["date"]
    assert "copy_tb_s" in capfd.readouterr().out
    assert (tmp_path / "out/lease-first.log").stat().st_size
    assert main([*arguments, "--stages", "nothing"]) == 2
    assert main([*arguments, "--archive", str(tmp_path / "none.tar.xz")]) == 2
    assert "make lease-archive" in capfd.readouterr().err


def test_the_archive_brings_back_what_was_packed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build, there, file = tmp_path / "build", tmp_path / "there", tmp_path / "lease.tar.xz"
    (build / "ladder/bundle").mkdir(parents=True)
    (build / "ladder/bundle/first.pt2").write_bytes(os.urandom(2000))
    arguments = ["--build", str(build), "--out", str(file)]
    assert archive([str(build / "ladder"), *arguments]) == 0
    assert unpack(file, there) == 1
    name = "ladder/bundle/first.pt2"
    assert (there / name).read_bytes() == (build / name).read_bytes()
    assert archive([str(build / "nothing"), *arguments]) == 2
    shutil.copytree(build / "ladder", tmp_path / "elsewhere")
    assert archive([str(tmp_path / "elsewhere"), *arguments]) == 1
    assert "does not lie in" in capfd.readouterr().err
    monkeypatch.setattr("benchmarks.lease.archive.MOST_BYTES", 1000)
    assert archive([str(build / "ladder"), *arguments]) == 1
    assert "leave a folder out" in capfd.readouterr().err


def test_kernels_and_gaps_are_added_up_by_name() -> None:
    def event(name: str, start: float, duration: float, kind: str = "kernel") -> dict[str, Any]:
        return {"name": name, "ts": start, "dur": duration, "cat": kind}

    found = kernel_table(
        [
            event("b", 20, 5),
            event("a", 0, 10),
            event("a", 5, 10),  # beside the first
            event("cudaLaunchKernel", 0, 100, "cuda_runtime"),
            event("copy", 30, 1, "gpu_memcpy"),
        ]
    )
    assert (found["launches"], found["wall_us"], found["summed_us"]) == (4, 31, 26)
    assert found["kernels"][0] == {"name": "a", "count": 2, "us": 20}
    assert found["gaps"] == [{"name": "a", "count": 1, "us": 5}, {"name": "b", "count": 1, "us": 5}]
    assert found["fills"] == []


def test_fills_of_memory_belong_to_the_kernel_behind_them() -> None:
    names = (
        "Memset (Unknown)",
        "product",
        "norm",
        "Memset (Device)",
        "Memset (Unknown)",
        "product",
        "Memset (Device)",
    )
    events = [
        {"name": name, "ts": 10 * place, "dur": 5, "cat": "gpu_memset" if "Memset" in name else "kernel"}
        for place, name in enumerate(names)
    ]
    assert kernel_table(events)["fills"] == [{"name": "product", "count": 3}]


def test_the_page_names_every_stage_with_its_limit() -> None:
    page = (ROOT / "docs/gpu.md").read_text()
    for call in CALLS.values():
        assert f"at most {call.seconds:.0f} s" in page
        for stage in call.cuda:
            row = next((line for line in page.splitlines() if line.startswith(f"| `{stage.name}`")), "")
            assert f"| {stage.limit:.0f} s |" in row, stage.name
