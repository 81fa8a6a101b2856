"""The attention benchmark where there is no GPU: it says so, and its inputs are what it claims."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.attention.inputs import AttentionInputs, Shape, random_inputs, video_inputs
from benchmarks.attention.main import main

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_it_says_what_still_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 1
    assert "--method-table" in capsys.readouterr().err


def test_unknown_sizes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--windows", "chunk 9"]) == 2
    assert "chunk 9" in capsys.readouterr().err
    assert main(["--frame-tokens", "1000"]) == 2
    assert "expected some of" in capsys.readouterr().err


def test_a_run_that_ends_early_leaves_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the time on a rented GPU ends, or where a kernel fails at one of sixteen shapes."""
    from benchmarks import timing
    from benchmarks.attention import timing as attention_timing

    done: list[Shape] = []

    def measure(kernels: object, shape: Shape, *_: object) -> list[dict[str, float]]:
        if len(done) == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        done.append(shape)
        return [{"sparsity": 0.9, "attend_us": 100.0 + shape.past}]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention_timing, "measure", measure)
    monkeypatch.setattr(timing, "machine_facts", lambda: {"device": "A GPU", "date": "2026-01-01"})
    with pytest.raises(RuntimeError, match="illegal memory access"):
        main(["--just-in-time", "--out", str(tmp_path)])
    (file,) = tmp_path.iterdir()
    assert file.name == "attention-times-a-gpu-2026-01-01.json"
    kept = json.loads(file.read_text())
    assert kept["machine"]["device"] == "A GPU"
    assert [row["attend_us"] for row in kept["rows"]] == [103.0, 109.0]


def test_help_needs_no_heavy_import() -> None:
    program = (
        "import sys; from benchmarks.attention.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'triton'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout.endswith("[]\n")


def check(inputs: AttentionInputs, shape: Shape) -> None:
    """Cache, chunk and block means hold the logical sequence."""
    slots = inputs.chunk.frame_slots.long()
    past_tokens = shape.past * shape.frame_tokens
    for cache, current, whole in (
        (inputs.past_k, inputs.k, inputs.keys),
        (inputs.past_v, inputs.v, inputs.values),
    ):
        assert torch.equal(cache[slots].flatten(0, 1), whole[:past_tokens])
        assert torch.equal(current, whole[past_tokens:])
    first = inputs.keys[: shape.block_k].float().mean(0)
    tail = (
        inputs.keys[shape.frame_tokens - shape.frame_tokens % shape.block_k : shape.frame_tokens]
        .float()
        .mean(0)
    )
    torch.testing.assert_close(inputs.chunk.past_kmean[slots[0], 0], first)
    if shape.frame_tokens % shape.block_k:
        torch.testing.assert_close(inputs.chunk.past_kmean[slots[0], -1], tail)


def test_inputs_are_consistent() -> None:
    shape = Shape(40, 4, 32, 16, heads=3, head_dim=64)
    check(random_inputs(shape, torch.bfloat16, "cpu", 0), shape)
    check(video_inputs(shape, (5, 8), "cpu", 0), shape)
    with pytest.raises(ValueError, match="5 x 9 tokens does not make 40"):
        video_inputs(shape, (5, 9), "cpu", 0)


@pytest.mark.parametrize(("sparsity", "kept"), [(0.8, 100), (0.9, 50), (0.95, 25)])
def test_table_entry_keeps_what_the_sparsity_says(sparsity: float, kept: int) -> None:
    shape = Shape(1536, 18, 64, 64)
    assert shape.resident == 504
    (entry,) = shape.keep_q20(sparsity)
    assert entry * 504 >> 20 == kept


def test_work_of_the_last_chunk() -> None:
    # 4 T K D H operations: 4680 queries, 21 frames of keys, 12 heads of 128.
    assert Shape(1560, 18, 64, 64).dense_flops() == pytest.approx(0.942e12, rel=1e-3)
