"""The worker's own figures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[3]


def test_the_peak_of_a_worker_is_not_its_callers() -> None:
    """What the operating system calls a program's peak starts at that of the program it was started from."""
    ballast = np.ones(400 * 2**20, dtype=np.uint8)
    code = "from export.parts.worker import peak_bytes; held = b'x' * 100 * 2**20; print(peak_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    del ballast
    assert 100 * 2**20 < int(done.stdout) < 300 * 2**20
