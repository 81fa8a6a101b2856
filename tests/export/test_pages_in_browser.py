"""Every page that a command writes in a real browser: offline, on a phone, in light and dark.

`SCREENSHOTS=FOLDER` keeps what is seen.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from export.compare.attention_map import AttentionMaps, write_maps
from export.compare.report import write_report
from export.report.bundle import inspect_bundle
from tests.export.compare.test_compare_report import comparison
from tests.runtime import handmade

CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
if CHROMIUM is None:
    pytest.skip("Chromium is not installed; on Debian: apt-get install chromium", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra test)")
FLAGS = ["--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]


def inspection(path: Path) -> None:
    handmade.build_bundle(path.parent / "bundle")
    inspect_bundle(path.parent / "bundle", page=path)


def maps(path: Path) -> None:
    """Two heads of 72 x 504 blocks: wider than any phone."""
    seen = np.random.default_rng(0).integers(0, 2, (2, 72, 504)).astype(np.float32)
    write_maps(AttentionMaps("what attention looks at", 24, 24, {6: {0: seen}}), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("compare", lambda path: write_report(comparison(), path)),
        ("inspect", inspection),
        ("attention", maps),
    ],
)
def test_a_page_on_a_phone_in_both_schemes(name: str, write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write(path)
    flags = [*FLAGS, *(["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else [])]
    asked: list[str] = []
    seen: list[tuple[str, float]] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        for scheme in ("light", "dark"):
            context = browser.new_context(
                viewport={"width": 360, "height": 740}, color_scheme=scheme, offline=True
            )
            page = context.new_page()
            page.on("request", lambda request: asked.append(request.url))
            page.goto(path.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
            assert page.evaluate(
                "[...document.images].every(image => image.complete && image.naturalWidth > 0)"
            )
            seen.append(page.evaluate(CONTRAST))
            if folder := os.environ.get("SCREENSHOTS"):
                page.screenshot(path=f"{folder}/{name}-{scheme}.png", full_page=True)
        browser.close()
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    (light, contrast), (dark, contrast_in_the_dark) = seen
    assert light != dark
    assert min(contrast, contrast_in_the_dark) >= 4.5  # what WCAG asks for of text


CONTRAST = """() => {
    const channels = colour => colour.match(/[0-9.]+/g).slice(0, 3).map(Number);
    const luminance = colour => channels(colour)
        .map(value => value / 255)
        .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
        .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
    const paper = getComputedStyle(document.body).backgroundColor;
    const behind = element => {
        for (; element; element = element.parentElement) {
            const colour = getComputedStyle(element).backgroundColor;
            if (colour !== 'rgba(0, 0, 0, 0)') return colour;
        }
        return paper;
    };
    let least = 21;
    for (const element of document.querySelectorAll('h1, h2, h3, p, td, th, span, figcaption, footer')) {
        if (!element.textContent.trim()) continue;
        const pair = [getComputedStyle(element).color, behind(element)].map(luminance);
        least = Math.min(least, (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05));
    }
    return [paper, least];
}"""
"""The page's background, and the least contrast of a text with what is behind it."""
