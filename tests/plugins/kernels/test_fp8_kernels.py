"""Runs fp8_interpreted.py in a process of its own, where Triton interprets kernels on the CPU; compiles some."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from plugins.compile import kernels as build

ROOT = Path(__file__).parents[3]


def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", "-n", "0",
         str(Path(__file__).parent / "fp8_interpreted.py")],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-5_000:]


@pytest.mark.parametrize("name", ["attend_fp8-bf16-d128-q64", "attend_e4m3-bf16-d128-q64"])
def test_attention_fits_into_registers(name: str, tmp_path: Path) -> None:
    """Blocks of 64 on sm_120, the largest of the shipped problems; bits are converted by the hardware."""
    pytest.importorskip("triton")
    built = build.build([120], tmp_path, only=lambda variant: variant.name == name)
    (image,) = built[120].images
    assert (image.spill_stores, image.spill_loads, image.stack) == (0, 0, 0)
    names = {argument.name: argument.element for argument in image.arguments}
    assert [names[name] for name in ("q", "k", "past_v", "past_kscale")] == [
        "bfloat16",
        "uint8",
        "uint8",
        "float32",
    ]
