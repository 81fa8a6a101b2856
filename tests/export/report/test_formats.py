"""The table of a search for formats, as a terminal shows it."""

from __future__ import annotations

from rich.console import Console

from export.report.formats import search_table
from runtime.bundle import FormatSearch


def test_the_choice_is_the_one_line_with_its_budget() -> None:
    frontier = ((0.0042, 0.0), (0.0031, 0.012), (0.0025, 0.04))
    search = FormatSearch(budget=0.02, error=0.012, seconds=0.0031, frontier=frontier)
    console = Console(width=100)
    with console.capture() as capture:
        console.print(search_table(search))
    lines = [line.split() for line in capture.get().splitlines()]
    assert ["3.1", "0.0120", "within", "0.02"] in lines
    assert [line for line in lines if line[-2:-1] == ["within"]] == [["3.1", "0.0120", "within", "0.02"]]
    assert lines.index(["4.2", "0.0000"]) < lines.index(["2.5", "0.0400"])
