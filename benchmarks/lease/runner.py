"""Runs stages one after the other within one budget, and keeps what they wrote at every moment.

Standard library only: the runner must not fail where a library does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .stages import Seconds, Stage

__all__ = ["Lease", "Outcome"]

RESERVE: Seconds = 4.0
"""Kept for writing the last results."""
GRACE: Seconds = 2.0
"""Between asking a process group to end and killing it."""
TAIL_CHARACTERS = 3000
LOG_BYTES = 8 << 20


@dataclass
class Outcome:
    """What became of a stage.

    Attributes:
        status: "waiting", "running", "done", "failed" (its exit status), "killed" (its limit) or "skipped" (no time was
            left for it).
        results: the JSON files that it wrote, by their stems, and `tests`, pytest's own report.
        tail: the end of what it said, where it did not end well.
    """

    stage: Stage
    status: str = "waiting"
    seconds: Seconds = 0.0
    code: int | None = None
    results: dict[str, Any] = field(default_factory=dict)
    tail: str = ""

    def record(self) -> dict[str, Any]:
        """For the result file."""
        about = {"status": self.status, "seconds": round(self.seconds, 1), "limit": self.stage.limit}
        return {
            **about,
            "code": self.code,
            "decides": self.stage.decides,
            "results": self.results,
            "tail": self.tail,
        }


class Lease:
    """One call: its stages, their folders, and the file that holds everything.

    Args:
        work: folder of the stages' own results and logs.
        build: folder of kernels, bundles and wheels.
        log: file of everything that the stages said, cut where it gets long.
        seconds: for all stages together.
        write: keeps the records of all stages; it is called after every stage.
        say: shows a line of progress.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        work: Path,
        build: Path,
        log: Path,
        seconds: Seconds,
        write: Callable[[dict[str, Any]], None],
        say: Callable[[str], None],
    ) -> None:
        self.outcomes = {stage.name: Outcome(stage) for stage in stages}
        self._work, self._build, self._log = work, build, log
        self._write, self._say = write, say
        self._start = time.monotonic()
        self._end = self._start + seconds
        self._running: dict[str, tuple[subprocess.Popen[bytes], Seconds]] = {}

    def run(self) -> bool:
        """Run them all; whether every stage ended well."""
        background = [o for o in self.outcomes.values() if o.stage.background]
        try:
            for outcome in background:
                self._begin(outcome)
            for outcome in self.outcomes.values():
                if not outcome.stage.background:
                    self._foreground(outcome)
                    self._keep()
        finally:
            for outcome in background:
                self._finish(outcome, 0.0)
            self._keep()
        return all(outcome.status == "done" for outcome in self.outcomes.values())

    def _left(self) -> Seconds:
        return self._end - RESERVE - time.monotonic()

    def _foreground(self, outcome: Outcome) -> None:
        stage = outcome.stage
        for name in stage.after:
            other = self.outcomes[name]
            self._finish(other, min(stage.patience, self._left()), keep_running=True)
            if other.status != "done":
                outcome.status, outcome.tail = "skipped", f"stage {name!r}, which it needs, is {other.status}"
                return
        if self._left() < 1:
            outcome.status, outcome.tail = "skipped", "no time was left"
            return
        self._begin(outcome)
        self._finish(outcome, min(stage.limit, self._left()))

    def _begin(self, outcome: Outcome) -> None:
        stage = outcome.stage
        results = self._work / stage.name
        results.mkdir(parents=True, exist_ok=True)
        command = [part.format(results=results, build=self._build) for part in stage.command]
        if stage.background:
            command = ["nice", "-n", "10", *command]
        environment = {**os.environ, "OUT": str(results), "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        environment |= {
            "LIGHTFORCING_KERNELS": str(self._build / "kernels"),
            "LIGHTFORCING_GPU_BUNDLES": str(self._build / "gpu-bundles"),
        }
        # Libraries that the machine lacks, beside its own.
        path = [str(self._build / "site"), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
        self._say(f"== {stage.name}, at {time.monotonic() - self._start:.0f} s, at most {stage.limit:.0f} s")
        with (results / "log").open("wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        outcome.status = "running"
        self._running[stage.name] = process, time.monotonic()

    def _finish(self, outcome: Outcome, patience: Seconds, *, keep_running: bool = False) -> None:
        """Wait for a stage; one that takes longer than `patience` is ended, or left running where that is asked."""
        name = outcome.stage.name
        if name not in self._running:
            return
        process, begun = self._running[name]
        try:
            process.wait(max(0.0, patience))
            outcome.status = "failed" if process.returncode else "done"
        except subprocess.TimeoutExpired:
            if keep_running and time.monotonic() - begun < outcome.stage.limit:
                return
            outcome.status = "killed"
        _end_group(process)
        del self._running[name]
        outcome.seconds, outcome.code = time.monotonic() - begun, process.returncode
        self._collect(outcome)
        self._say(f"   {name}: {outcome.status} after {outcome.seconds:.0f} s")

    def _collect(self, outcome: Outcome) -> None:
        folder = self._work / outcome.stage.name
        for path in sorted(folder.glob("*.json")):
            try:
                outcome.results[path.stem] = json.loads(path.read_text())
            except ValueError as error:
                outcome.results[path.stem] = f"not readable: {error}"
        if (folder / "tests.xml").exists():
            outcome.results["tests"] = _tests(folder / "tests.xml")
        said = (folder / "log").read_bytes()
        if outcome.status != "done":
            outcome.tail = said[-TAIL_CHARACTERS:].decode(errors="replace")
        with self._log.open("ab") as log:
            log.write(f"\n==== {outcome.stage.name}: {outcome.status}\n".encode())
            log.write(said[-LOG_BYTES // len(self.outcomes) :])

    def _keep(self) -> None:
        self._write({name: outcome.record() for name, outcome in self.outcomes.items()})


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End what a stage has started and left, its own process included; one that cannot be killed is left behind."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, kind)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def _tests(path: Path) -> dict[str, Any]:
    """Pytest's report: how many passed, and of the others which and why."""
    try:
        cases = list(ET.parse(path).getroot().iter("testcase"))
    except ET.ParseError as error:
        return {"problem": f"pytest's report is not readable: {error}"}
    found: dict[str, Any] = {"passed": 0, "failed": {}, "skipped": {}}
    for case in cases:
        name = case.get("name", "?")
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        skip = case.find("skipped")
        if bad is not None:
            found["failed"][name] = (bad.get("message") or bad.text or "")[:600]
        elif skip is not None:
            found["skipped"][name] = (skip.get("message") or "")[:200]
        else:
            found["passed"] += 1
    found["seconds"] = {case.get("name", "?"): float(case.get("time", 0)) for case in cases}
    return found
