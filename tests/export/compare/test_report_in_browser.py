"""The page of a comparison in a real browser: offline, on a phone, in light and dark."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from export.compare.report import write_report
from tests.export.compare.test_compare_report import comparison

CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
if CHROMIUM is None:
    pytest.skip("Chromium is not installed; on Debian: apt-get install chromium", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra test)")
FLAGS = ["--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]


def test_the_report_on_a_phone_in_both_schemes(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(comparison(), path)
    flags = [*FLAGS, *(["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else [])]
    asked: list[str] = []
    papers = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        for scheme in ("light", "dark"):
            page = browser.new_context(
                viewport={"width": 360, "height": 740}, color_scheme=scheme, offline=True
            ).new_page()
            page.on("request", lambda request: asked.append(request.url))
            page.goto(path.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
            assert page.evaluate(
                "[...document.images].every(image => image.complete && image.naturalWidth > 0)"
            )
            papers.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            if folder := os.environ.get("SCREENSHOTS"):
                page.screenshot(path=f"{folder}/report-{scheme}.png", full_page=True)
        browser.close()
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert papers[0] != papers[1]
