"""The search for formats: against every combination there is, and what it does where there are too many of them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from export.errors import InputError
from export.quantize.search import Choice, Option, Point, frontier, within

FORMATS = ("bf16", "fp8", "nvfp4")


def drawn(seed: int, count: int) -> list[Choice]:
    """Linears whose narrower formats are usually faster and less exact; not always, so that some are of no use."""
    rng = np.random.default_rng(seed)
    choices = []
    for index in range(count):
        size, weight = rng.choice([1.0, 1.0, 3.0, 6.0]), rng.uniform(0.2, 2.0)
        options = tuple(
            Option(format, size * seconds * rng.choice([1.0, 1.0, 3.0]), weight * error)
            for format, seconds, error in zip(FORMATS, (4.0, 2.0, 1.0), (0.0, 0.03, 0.13), strict=True)
        )
        choices.append(Choice(f"linear.{index}", options))
    return choices


def everything(choices: list[Choice]) -> list[tuple[float, float]]:
    """Time and error of every combination."""
    combinations = itertools.product(*(choice.options for choice in choices))
    return [
        (sum(option.seconds for option in chosen), math.hypot(*(option.error for option in chosen)))
        for chosen in combinations
    ]


@pytest.mark.parametrize("seed", range(5))
def test_no_combination_is_better(seed: int) -> None:
    choices = drawn(seed, 7)
    points, known = frontier(choices), everything(choices)
    largest = max(error for _, error in known)
    for budget in np.linspace(0.0, largest, 40):
        best = min((seconds for seconds, error in known if error <= budget + 1e-12), default=None)
        assert best is not None
        found = within(points, budget + 1e-12)
        assert found.seconds == pytest.approx(best, rel=1e-12)
        assert found.error <= budget + 1e-12


def test_a_point_is_what_its_formats_take() -> None:
    choices = drawn(11, 6)
    for point in frontier(choices):
        chosen = [
            next(option for option in choice.options if option.format == point.by_name(choices)[choice.name])
            for choice in choices
        ]
        assert point.seconds == pytest.approx(sum(option.seconds for option in chosen))
        assert point.error == pytest.approx(math.hypot(*(option.error for option in chosen)))


def test_the_frontier_runs_from_slow_to_wrong() -> None:
    points = frontier(drawn(3, 7))
    assert len(points) > 5
    assert all(a.seconds > b.seconds and a.error < b.error for a, b in itertools.pairwise(points))
    assert points[0].error == 0.0


def test_two_hundred_linears_of_their_own_stay_within_the_budget() -> None:
    """By the linear relaxation no combination can be faster than the bound; what is found is close to it."""
    choices = drawn(5, 240)
    points = frontier(choices, most_states=512)
    budget = 0.4 * points[-1].error
    found = within(points, budget)
    assert found.error <= budget
    assert points[0].error == 0.0
    assert found.seconds < bound(choices, budget) * 1.01


def bound(choices: list[Choice], budget: float) -> float:
    """The largest Lagrangian bound: time plus a price for squared error, which each choice makes cheapest by itself."""
    bounds = []
    for price in np.geomspace(1e-3, 1e5, 400):
        cheapest = sum(min(o.seconds + price * o.error**2 for o in choice.options) for choice in choices)
        bounds.append(cheapest - price * budget**2)
    return max(bounds)


def test_the_order_of_equals_does_not_change_the_result() -> None:
    choices = drawn(2, 6)
    assert frontier(choices) == frontier(choices)
    reordered = frontier(choices[::-1])
    assert [(p.seconds, p.error) for p in frontier(choices)] == [
        (pytest.approx(p.seconds), pytest.approx(p.error)) for p in reordered
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "blocks.0.ffn.2 has no format to choose from"),
        ((Option("fp8", 1.0, math.nan),), "in fp8 takes 1 s and has the error nan"),
        ((Option("fp8", -1.0, 0.1),), "in fp8 takes -1 s"),
    ],
)
def test_figures_that_cannot_be_are_refused(options: tuple[Option, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        frontier([Choice("blocks.0.ffn.2", options)])


def test_a_budget_below_everything_is_refused() -> None:
    points = [Point(2.0, 0.03, ("fp8",)), Point(1.0, 0.13, ("nvfp4",))]
    assert within(points, 0.05).formats == ("fp8",)
    with pytest.raises(InputError, match=r"output error of at most 0.01; the least is 0.03"):
        within(points, 0.01)
