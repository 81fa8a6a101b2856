"""Trials of one campaign in a process of their own."""

from __future__ import annotations

import json
import os
import random
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Trials"]

_ROOT = Path(__file__).resolve().parents[2]
_LIMIT = 120.0
"""Seconds after which a trial hangs."""


@dataclass(frozen=True)
class Trials:
    """The trials of a campaign: each is drawn from the seed, the campaign's name and its number alone."""

    name: str
    seed: int
    prepared: Path

    def run(self, first: int, count: int | None, seconds: float) -> Iterator[tuple[int, str, str]]:
        """(number, outcome, detail) of each trial that is done in time; the first one always is."""
        end, following = time.monotonic() + seconds, first
        last = None if count is None else first + count
        while (last is None or following < last) and (following == first or time.monotonic() < end):
            for number, outcome, detail in self._process(following, end, last):
                following = number + 1
                yield number, outcome, detail

    def _process(self, first: int, end: float, last: int | None) -> Iterator[tuple[int, str, str]]:
        """One process, until the time is over, all is done, or the process is."""
        command = [
            sys.executable,
            "-m",
            "tests.fuzz.worker",
            self.name,
            str(self.seed),
            str(self.prepared),
            str(first),
        ]
        process = subprocess.Popen(
            command,
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdin is not None and process.stdout is not None
        number = first
        try:
            while (last is None or number < last) and (number == first or time.monotonic() < end):
                process.stdin.write("go\n")
                process.stdin.flush()
                ready, _, _ = select.select([process.stdout], [], [], _LIMIT)
                line = process.stdout.readline() if ready else ""
                if not line:
                    process.kill()
                    code = process.wait()
                    yield number, "wrong", "it hangs" if not ready else f"the process ended with {code}"
                    return
                outcome, detail = json.loads(line)
                yield number, outcome, detail
                number += 1
        except BrokenPipeError:
            yield number, "wrong", f"the process ended with {process.wait()}"
        finally:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()


def _serve(name: str, seed: str, prepared: Path, first: int) -> None:
    from .campaigns import CAMPAIGNS

    # What libraries print must not be taken for an outcome.
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    number = first
    while sys.stdin.readline():
        chance = random.Random(f"{seed}/{name}/{number}")
        with tempfile.TemporaryDirectory(prefix="trial-") as folder:
            try:
                outcome: tuple[str, str] = (CAMPAIGNS[name](chance, Path(folder), prepared), "")
            except BaseException as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                outcome = (
                    "wrong",
                    f"{type(error).__name__}: {str(error)[:300]} ({where.filename}:{where.lineno})",
                )
        said.write(json.dumps(outcome) + "\n")
        said.flush()
        number += 1


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
