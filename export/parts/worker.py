"""A process of its own for work that may take its process down with it: its caller's side, and its own.

Nothing but the standard library is imported here, so that a worker starts fast.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "Outcome",
    "Send",
    "ended_by",
    "peak_bytes",
    "progress_monitor",
    "run_worker",
    "serve",
    "was_killed",
]

_KILLED = 9  # SIGKILL, which Windows has no name for
_NTSTATUS_ERROR = 0xC0000000

Send = Callable[[dict[str, Any]], None]
"""What a worker sends its messages with."""


@dataclass(frozen=True)
class Outcome:
    """How a worker ended: its exit code, the messages it sent, merged, and what it wrote to its standard error."""

    code: int
    result: dict[str, Any]
    log: str


def run_worker(
    module: str,
    request: Mapping[str, Any],
    environment: Mapping[str, str],
    progress: Callable[[str, int, int], None] | None,
) -> Outcome:
    """Run the module `module` (its whole name) on `request`, and wait for it.

    A worker prints JSON messages, one a line; those with a `phase` go to `progress`. It is ended if this call is
    interrupted.
    """
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        with subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(request)],
            stdin=subprocess.PIPE,  # which nothing is written to: see `serve`
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**environment, "PYTHONPATH": path},
        ) as worker:
            result: dict[str, Any] = {}
            try:
                assert worker.stdout is not None
                for line in worker.stdout:
                    message = json.loads(line)
                    if "phase" in message and progress is not None:
                        progress(message["phase"], message["done"], message["total"])
                    result |= message
                code = worker.wait()
            finally:
                if worker.poll() is None:
                    worker.kill()
        log.seek(0)
        return Outcome(code, result, log.read())


def serve(work: Callable[[dict[str, Any], Send], None]) -> None:
    """Be the worker: do `work` on the request that is this program's argument.

    Libraries may write to the standard output, which carries the messages: theirs goes to the standard error. The
    standard input ends with the process that started this one, and so does the worker, whatever it is at: a build that
    was killed has let go of its lock.
    """
    threading.Thread(target=_end_with_input, daemon=True).start()
    with os.fdopen(os.dup(1), "w") as channel:
        os.dup2(2, 1)

        def send(message: dict[str, Any]) -> None:
            channel.write(json.dumps(message) + "\n")
            channel.flush()

        with contextlib.suppress(BrokenPipeError):
            work(json.loads(sys.argv[1]), send)


def _end_with_input() -> None:
    os.read(0, 1)
    os._exit(1)


def was_killed(code: int) -> bool:
    """Whether an exit code says that the system ended the process, as it does where memory runs out."""
    return code == -_KILLED


def ended_by(code: int) -> str | None:
    """What ended a process that did not end by itself: a signal, or on Windows an exception; None where it did."""
    if code < 0:
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"
    return f"exception {code:#x}" if code >= _NTSTATUS_ERROR else None


def peak_bytes() -> int:
    """Largest resident memory of this program; the system's own figure counts the program that started it, too."""
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform != "win32":
        import resource

        # macOS counts bytes here, the others KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    import psutil

    return int(psutil.Process().memory_info().peak_wset)


def progress_monitor(trt: Any, send: Send) -> Any:
    """An `IProgressMonitor` of TensorRT or TensorRT-RTX, whose module `trt` is, that sends how far a build is."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:  # the phases inside of one start over and over
                self.phases[phase_name] = num_steps
                send({"phase": phase_name, "done": 0, "total": num_steps})

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.phases:
                send({"phase": phase_name, "done": step + 1, "total": self.phases[phase_name]})
            return True

        def phase_finish(self, phase_name: str) -> None:
            total = self.phases.pop(phase_name, None)
            if total is not None:
                send({"phase": phase_name, "done": total, "total": total})

    return Monitor()
