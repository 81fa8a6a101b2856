"""A process of its own for work that may take its process down with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Outcome", "run_worker"]


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
    """Run `module` of this package on `request`, and wait for it.

    A worker prints JSON messages, one a line; those with a `phase` go to `progress`. It is ended if this call is
    interrupted.
    """
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.{module}", json.dumps(request)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**environment, "PYTHONPATH": path},
        )
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
                worker.wait()
        log.seek(0)
        return Outcome(code, result, log.read())
