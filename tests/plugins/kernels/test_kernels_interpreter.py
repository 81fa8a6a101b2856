"""Runs kernels_interpreted.py in a process of its own, where Triton interprets kernels on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]


def test_binding_registers_both_operators_for_cuda() -> None:
    from plugins.eager.launch import bind_cuda
    from plugins.nodes import ops

    bind_cuda()
    for name in (ops.HIERARCHICAL_SPARSE_ATTENTION, ops.QK_PREPARE):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lightforcing::{name}", "CUDA")


@pytest.mark.parametrize("tier", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_in_the_interpreter(tier: str) -> None:
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", "-m", tier,
         __file__.replace("test_kernels_interpreter", "kernels_interpreted")],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-5_000:]
