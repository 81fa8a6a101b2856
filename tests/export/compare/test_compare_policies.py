"""Methods of selection side by side, and the picture of what they look at."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.cli.main import main
from export.compare.attention_map import AttentionMaps, attention_maps, write_maps
from export.errors import ComparisonError
from tests.export.html_page import Page


def test_methods_against_full_attention(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two chunks: the second has 3 past frames of 2 blocks, and keeps int(0.173 * 12) = 2 of 12."""
    report = tmp_path / "report.json"
    arguments = [
        "compare",
        str(tiny_bundle),
        "--policies",
        "dense,hsa",
        "--chunks",
        "2",
        "--json",
        str(report),
    ]
    assert main(arguments) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "dense 100.0% 0.0e+00 equal" in text
    assert "hsa 16.7%" in text
    rows = {row["name"]: row for row in json.loads(report.read_text())["rows"]}
    assert rows["dense"]["relative"] == 0
    assert rows["hsa"]["relative"] > 1e-3


def test_what_is_drawn_is_what_was_kept(tiny_bundle: Path) -> None:
    maps = attention_maps(tiny_bundle, chunks=2, layers=(0, 5))
    first, second = maps.chunks[0], maps.chunks[1]
    assert all((seen == 1).all() for seen in first.values())
    assert [seen.shape for seen in second.values()] == [(2, 6, 12)] * 2
    assert all((seen.sum(2) == 2).all() for seen in second.values())
    with pytest.raises(ComparisonError, match="no layer 6; tiny has 0 to 5"):
        attention_maps(tiny_bundle, chunks=1, layers=(6,))


@pytest.mark.parametrize("name", ["map.png", "map.html"])
def test_a_picture(tmp_path: Path, name: str) -> None:
    """One chunk of two frames after one, blocks of 1 query and 2 keys a frame: what is seen is blue."""
    seen = np.zeros((1, 2, 6), np.float32)
    seen[0, 0, 1] = 1
    write_maps(AttentionMaps("a <title>", 1, 2, {1: {0: seen}}), tmp_path / name)
    if name.endswith("html"):
        page = Page(tmp_path / name)
        assert "a <title>" in page.text
        assert "chunk 1, layer 0: 8.3% seen" in page.text
        (image,) = page.links
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(image.split(",")[1]))))
        assert pixels.shape == (16, 48, 4)
        seen_part = pixels[:8, 8:16]  # the second block of keys; lines cover its last row and no more
        assert (seen_part[:7, :, 3] == 255).all()
        assert (pixels[:7, 17:32, 3] == 0).all()  # not seen: the page's own colour
    else:
        pixels = np.asarray(Image.open(tmp_path / name))
        blue = (pixels == (47, 126, 219)).all(-1)
        assert 40 <= blue.sum() <= 64  # one block of 8 x 8, less what lines cover


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("compare . --policies hsa,monarch", "'monarch' is none of hsa, dense"),
        ("compare . --policies hsa,hsa", "names a policy twice"),
        ("attention-map . --out map.svg", "neither a page (.html) nor an image (.png)"),
        ("attention-map . --layers 0,a", "'a' is no whole number"),
    ],
)
def test_bad_arguments(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    assert message in capsys.readouterr().err
