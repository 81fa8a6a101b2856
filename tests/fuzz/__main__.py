"""`python -m tests.fuzz`: every campaign in turns until the time is over; a table, and JSON where asked for.

A campaign runs in a process of its own, which says each trial's number before it begins: what crashes or hangs it is
known, counted as wrong, and the next trial goes on in a new one. `--only NAME --seed S --first N --trials 1` repeats
one.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .campaigns import CAMPAIGNS, prepare
from .worker import Trials

_TURN = 20.0
"""Seconds of one campaign, before the next has its turn."""


@dataclass
class Figures:
    """What came of a campaign's trials."""

    tried: int = 0
    right: int = 0
    clear: int = 0
    accepted: int = 0
    wrong: list[str] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="time for all campaigns (300)")
    parser.add_argument("--seed", type=int, help="seed (drawn, and printed)")
    parser.add_argument("--only", choices=sorted(CAMPAIGNS), help="one campaign")
    parser.add_argument("--first", type=int, default=0, help="number of the first trial (0)")
    parser.add_argument("--trials", type=int, help="trials of each campaign at most")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    options = parser.parse_args()
    seed = secrets.randbits(32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    names = [options.only] if options.only else list(CAMPAIGNS)
    figures = {name: Figures() for name in names}
    following = dict.fromkeys(names, options.first)
    end = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        prepared = Path(scratch) / "prepared"
        prepared.mkdir()
        prepare(prepared)
        while names and time.monotonic() < end:
            for name in list(names):
                left = None if options.trials is None else options.first + options.trials - following[name]
                if left == 0:
                    names.remove(name)
                    continue
                turn = min(_TURN, max(0.0, end - time.monotonic()))
                _take_turn(figures[name], following, Trials(name, seed, prepared), left, turn)
    return _report(figures, seed, options)


def _take_turn(
    figures: Figures, following: dict[str, int], trials: Trials, left: int | None, seconds: float
) -> None:
    for number, outcome, detail in trials.run(following[trials.name], left, seconds):
        following[trials.name] = number + 1
        figures.tried += 1
        if outcome == "wrong":
            figures.wrong.append(f"trial {number}: {detail}")
            print(f"WRONG {trials.name}, seed {trials.seed}, trial {number}: {detail}", flush=True)
        else:
            setattr(figures, outcome, getattr(figures, outcome) + 1)


def _report(figures: dict[str, Figures], seed: int, options: argparse.Namespace) -> int:
    print(f"{'campaign':30} {'tried':>7} {'right':>7} {'clear':>7} {'accepted':>9} {'wrong':>6}")
    for name, found in figures.items():
        print(
            f"{name:30} {found.tried:7} {found.right:7} {found.clear:7} {found.accepted:9} {len(found.wrong):6}"
        )
    if options.json:
        document = {"seed": seed, "campaigns": {name: asdict(found) for name, found in figures.items()}}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if any(found.wrong for found in figures.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
