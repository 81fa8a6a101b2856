"""The benchmark of all images: what it does with one that is wrong, ends the process or never returns."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.attention.candidates import DONE, table_rows, watch
from benchmarks.attention.main import main

# Measures four names, as the real one does. The second kills the process, the third hangs.
PROCESS = """
import json, os, sys, time
from pathlib import Path
path = Path(sys.argv[1])
state = json.loads(path.read_text()) if path.exists() else {"rows": []}
def keep():
    path.with_suffix(".tmp").write_text(json.dumps(state)); path.with_suffix(".tmp").replace(path)
for name in ("first", "second", "third", "fourth"):
    if name in state.get("failed", {}) or name in [row["name"] for row in state["rows"]]:
        continue
    state["running"] = name
    keep()
    if name == "second":
        sys.exit("CUDA error: an illegal memory access was encountered")
    if name == "third":
        time.sleep(600)
    state["rows"].append({"name": name})
    keep()
state["running"] = "done"
keep()
"""


def test_an_image_that_fails_or_hangs_costs_only_itself(tmp_path: Path) -> None:
    program, state_file = tmp_path / "measure.py", tmp_path / "state.json"
    program.write_text(PROCESS)
    state = watch([sys.executable, str(program), str(state_file)], state_file, 60.0, patience_s=1.0)
    assert state["running"] == DONE
    assert [row["name"] for row in state["rows"]] == ["first", "fourth"]
    assert "illegal memory access" in state["failed"]["second"]
    assert "did not return within 1 s" in state["failed"]["third"]
    assert json.loads(state_file.read_text()) == state


def test_the_budget_ends_it_and_leaves_what_there_is(tmp_path: Path) -> None:
    program, state_file = tmp_path / "measure.py", tmp_path / "state.json"
    program.write_text(PROCESS)
    state = watch([sys.executable, str(program), str(state_file)], state_file, 2.0, patience_s=60.0)
    assert state["running"] == "third"
    assert [row["name"] for row in state["rows"]] == ["first"]


def test_a_process_that_measures_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="before it measured anything: no device"):
        watch([sys.executable, "-c", "import sys; sys.exit('no device')"], tmp_path / "state.json", 60.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--candidates", "--out", str(tmp_path)]) == 1
    assert "PyTorch finds no CUDA device" in capsys.readouterr().err


def test_efficiency_is_held_against_dense_of_the_same_window() -> None:
    attend = {"kernel": "attend", "window": "chunk 7", "block_q": 128, "block_k": 64, "name": "one"}
    attend |= {"sparsity": 0.9, "kept_blocks": 50.4, "resident_blocks": 504, "error": 0.003}
    rows = [
        {"name": "dense", "kernel": "dense", "window": "chunk 7", "best_dense_us": 1500.0},
        {"name": "dense", "kernel": "dense", "window": "chunk 4", "best_dense_us": 900.0},
        {**attend, "attend_us": 200.0},
        {**attend, "name": "two", "attend_us": None, "error": float("nan")},
    ]
    *_, one, two = table_rows({"rows": rows}, (0.8, 0.9))
    assert one[:6] == ["chunk 7", 128, 64, "one", None, None]
    assert one[6:] == [200.0, pytest.approx(0.75)]
    assert two[6:] == ["wrong", "nan"]
