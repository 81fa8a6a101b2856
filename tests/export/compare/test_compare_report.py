"""The page that a comparison is written as: complete, self-contained, and safe whatever a bundle calls itself."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.compare.report import write_report
from export.compare.result import Comparison, Film, Plot, Row, Series, comparison_table, difference, psnr
from export.page import png
from tests.export.html_page import Page

HOSTILE = "</title><script>alert(1)</script>\"'&<img src=x onerror=y>"


def film(name: str, shift: int = 0) -> Film:
    frames = np.random.default_rng(0).integers(0, 200, (9, 16, 24, 3), dtype=np.uint8)
    return Film(name, frames + np.uint8(shift))


def comparison(name: str = "tiny", relative: float = 0.01) -> Comparison:
    return Comparison(
        title=f"{name} against PyTorch",
        bundle=name,
        facts={"bundle": name, "command": f"build {name}"},
        tools={"torch": "2.13.0"},
        rows=[
            Row("step", name, 12, "x0", relative, 0.5, 0.1),
            Row("rollout", "3 chunks", 1, "frames", 0.02, 3.0, 0.1, psnr=41.5),
        ],
        plots=[
            Plot("Error of each layer", ("0", "1", "2"), (Series("keys", (0.01, None, 0.1)),), "layer"),
            Plot("Nothing to see", ("0",), (Series("equal", (0.0,)),), "layer"),
        ],
        films=[film("PyTorch"), film(name, shift=2)],
    )


def written(made: Comparison, folder: Path) -> Page:
    write_report(made, folder / "report.html")
    return Page(folder / "report.html")


def test_the_page_has_everything(tmp_path):
    page = written(comparison(), tmp_path)
    for expected in ("tiny against PyTorch", "All 2 rows", "41.5 dB", "1.0e-02", "build tiny", "2.13.0"):
        assert expected in page.text
    for expected in ("Error of each layer", "keys, layer 2: 1.00e-01", "frame 8", "differences are 8 times"):
        assert expected in page.text
    assert "Nothing to see" not in page.text  # a logarithmic axis has no place for zero
    assert page.tags.count("circle") == 2
    assert page.tags.count("img") == 3 * 4


def test_frames_are_those_of_the_films(tmp_path):
    made = comparison()
    images = [base64.b64decode(link.split(",")[1]) for link in written(made, tmp_path).links]
    picked = [0, 3, 5, 8]
    shown = [np.asarray(Image.open(io.BytesIO(image))) for image in images]
    for column, frame in enumerate(picked):
        np.testing.assert_array_equal(shown[column], made.films[0].frames[frame])
        np.testing.assert_array_equal(shown[4 + column], made.films[1].frames[frame])
        np.testing.assert_array_equal(shown[8 + column], np.full((16, 24, 3), 16))


def test_names_are_escaped(tmp_path):
    page = written(comparison(HOSTILE), tmp_path)
    assert "script" not in page.tags
    assert page.tags.count("img") == 3 * 4
    assert HOSTILE in page.text
    comparison_table(HOSTILE, comparison("[bold red]not markup[/] [/]").rows)


@pytest.mark.parametrize("relative", [0.2, float("nan"), float("inf")])
def test_failures_are_counted(relative, tmp_path):
    failed = comparison(relative=relative)
    assert not failed.passed
    assert "1 of 2 rows are past their tolerance" in written(failed, tmp_path).text
    failed.write_json(tmp_path / "c.json")
    document = json.loads((tmp_path / "c.json").read_text(), parse_constant=pytest.fail)
    assert document["passed"] is False
    assert document["rows"][0]["relative"] == (0.2 if relative == 0.2 else None)


def test_png_is_lossless():
    image = np.random.default_rng(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png(image)))), image)


def test_differences():
    gap = difference(np.array([3.0, 0.0]), np.array([0.0, 4.0]), 1.0)
    assert (gap.relative, gap.largest, bool(gap)) == (1.25, 4.0, False)
    assert difference(np.zeros(2), np.zeros(2)).relative == 0
    broken = difference(np.array([np.nan]), np.ones(1), 1.0)
    assert not broken
    assert broken.rank == np.inf
    black, white = np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 255, np.uint8)
    assert psnr(white, black) == 0
    assert psnr(black, black) is None
    assert psnr(np.full_like(black, 1), black) == pytest.approx(48.13, abs=0.01)
