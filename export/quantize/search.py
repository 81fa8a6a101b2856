"""Which format each linear gets: the least time whose output error stays within a budget.

Errors add up as squares: those of different linears have nothing to do with each other. With one choice out of a few
for each linear this is the multiple-choice knapsack problem, solved here linear by linear: every combination so far
that is neither faster nor more exact than another is dropped. What is left at the end is the whole frontier of time
against error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from export.errors import InputError

__all__ = ["Choice", "Option", "Point", "frontier", "within"]

MOST_STATES = 1024
"""Combinations that are kept. Where there are more (an engine for each layer), the fastest of those with nearly the
same error stand for all: the result is within the budget all the same, and may be a little slower than the best."""


@dataclass(frozen=True)
class Option:
    """One format of one linear: seconds that it takes, and its share of the output error (relative L2)."""

    format: str
    seconds: float
    error: float


@dataclass(frozen=True)
class Choice:
    """What may be chosen for one linear, or for all linears that must have the same format."""

    name: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Point:
    """A point of the frontier: a format for each choice, in their order."""

    seconds: float
    error: float
    formats: tuple[str, ...]

    def by_name(self, choices: Sequence[Choice]) -> dict[str, str]:
        """The formats by the choices' names."""
        return {choice.name: format for choice, format in zip(choices, self.formats, strict=True)}


@dataclass(frozen=True)
class _State:
    """A combination for the choices so far; `before` is the one that it goes on from."""

    seconds: float
    square: float
    format: str
    before: _State | None

    def formats(self) -> Iterator[str]:
        state: _State | None = self
        while state is not None and state.before is not None:
            yield state.format
            state = state.before


def frontier(choices: Sequence[Choice], *, most_states: int = MOST_STATES) -> list[Point]:
    """All combinations that none other beats in both time and error, the slowest and most exact first.

    Raises:
        InputError: a choice has no option, or a figure is negative or not finite; names it.
    """
    states = [_State(0.0, 0.0, "", None)]
    for choice in choices:
        _check(choice)
        extended = (
            _State(state.seconds + option.seconds, state.square + option.error**2, option.format, state)
            for state in states
            for option in choice.options
        )
        states = _thinned(_undominated(extended), most_states)
    return [
        Point(state.seconds, math.sqrt(state.square), tuple(state.formats())[::-1])
        for state in reversed(states)
    ]


def _check(choice: Choice) -> None:
    if not choice.options:
        raise InputError(f"{choice.name} has no format to choose from")
    for option in choice.options:
        if not (0 <= option.seconds < math.inf and 0 <= option.error < math.inf):
            raise InputError(
                f"{choice.name} in {option.format} takes {option.seconds:g} s and has the error {option.error:g}; "
                "expected finite, positive numbers; calibrate this model again"
            )


def _undominated(states: Iterator[_State]) -> list[_State]:
    """The fastest first; each is more exact than all before it."""
    kept: list[_State] = []
    for state in sorted(states, key=lambda state: (state.seconds, state.square)):
        if not kept or state.square < kept[-1].square:
            kept.append(state)
    return kept


def _thinned(states: list[_State], most: int) -> list[_State]:
    """At most `most` states: of those whose errors fall into the same of as many intervals, the fastest."""
    if len(states) <= most:
        return states
    width = states[0].square / (most - 1)
    kept: dict[int, _State] = {}
    for state in states:
        kept.setdefault(math.floor(state.square / width), state)
    kept[0] = states[-1]  # the most exact one stays
    return sorted(kept.values(), key=lambda state: state.seconds)


def within(points: Sequence[Point], budget: float) -> Point:
    """The fastest point of a frontier whose error is at most `budget`.

    Raises:
        InputError: there is none.
    """
    fitting = [point for point in points if point.error <= budget]
    if not fitting:
        raise InputError(
            f"no choice of formats has an output error of at most {budget:g}; the least is "
            f"{min(point.error for point in points):.3g}"
        )
    return min(fitting, key=lambda point: (point.seconds, point.error))
