"""The worker's own figures, and its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from export.parts.worker import run_worker, serve

ROOT = Path(__file__).parents[3]


def test_the_peak_of_a_worker_is_not_its_callers() -> None:
    """What the operating system calls a program's peak starts at that of the program it was started from."""
    ballast = np.ones(400 * 2**20, dtype=np.uint8)
    code = "from export.parts.worker import peak_bytes; held = b'x' * 100 * 2**20; print(peak_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    del ballast
    assert 100 * 2**20 < int(done.stdout) < 300 * 2**20


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="kills as POSIX does")
def test_a_worker_ends_with_the_process_that_started_it() -> None:
    """Also while it is at something that never looks up, as a compiler is."""
    caller = subprocess.Popen(
        [sys.executable, "-m", "tests.export.parts.test_worker"], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert caller.stdout is not None
    worker = int(caller.stdout.readline())
    os.kill(worker, 0)
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    until = time.monotonic() + 30
    while Path(f"/proc/{worker}").exists() and _state(worker) != "Z" and time.monotonic() < until:
        time.sleep(0.02)
    assert not Path(f"/proc/{worker}").exists() or _state(worker) == "Z"


def _state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        serve(
            lambda request, send: (send({"phase": str(os.getpid()), "done": 0, "total": 1}), time.sleep(100))
        )
    else:
        run_worker(
            "tests.export.parts.test_worker",
            {},
            os.environ,
            lambda phase, done, total: print(phase, flush=True),
        )
