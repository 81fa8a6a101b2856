"""The page in a real browser: Chromium, headless, driven by Playwright."""

from __future__ import annotations

import base64
import io
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.quality.parser import observe
from serving.settings import Limits, Settings
from tests.serving.client import StreamClient, wait_until
from tests.serving.conftest import RunningServer, StartServer, running

CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
if CHROMIUM is None:
    pytest.skip("Chromium is not installed; on Debian: apt-get install chromium", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra test)")
# The browser's own traffic is kept off: it looks for updates otherwise.
FLAGS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--allow-loopback-in-peer-connection",
    *(["--no-sandbox"] if os.geteuid() == 0 else []),
]
SQUARE = "a yellow square on black moves right from the top left"
CIRCLE = "a blue circle on white moves left from the bottom right"


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def open_page(browser: playwright.Browser) -> Iterator[Callable[..., playwright.Page]]:
    """Opens the page of a server; an error in its scripts fails the test."""
    contexts, errors = [], []

    def open_at(url: str, **options: object) -> playwright.Page:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert not errors


def until_state(page: playwright.Page, state: str, seconds: float = 30) -> None:
    page.wait_for_selector(f'html[data-state="{state}"]', timeout=1000 * seconds)


def begin(page: playwright.Page, prompt: str) -> None:
    until_state(page, "ready")
    page.fill("#prompt", prompt)
    page.click("#go")


def shown(page: playwright.Page) -> int:
    """The chunk on the screen."""
    return int(page.get_attribute("#screen", "data-chunk") or -1)


def shows(page: playwright.Page, chunk: int, seconds: float = 60) -> bool:
    return wait_until(lambda: shown(page) >= chunk, seconds)


def picture(page: playwright.Page) -> tuple[int, int, np.ndarray]:
    """Chunk, frame, and the canvas's pixels."""
    chunk, frame, url = page.evaluate(
        """() => { const canvas = document.getElementById("screen");
        return [canvas.dataset.chunk, canvas.dataset.frame, canvas.toDataURL("image/png")]; }"""
    )
    data = base64.b64decode(url.partition(",")[2])
    return int(chunk), int(frame or -1), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_the_picture_is_what_the_prompt_says_and_changes_where_the_receipt_says(
    trained_bundle: Path, start_server: StartServer, open_page: Callable[..., playwright.Page]
) -> None:
    server = start_server(bundle=trained_bundle, examples=(SQUARE,))
    page = open_page(server.url)
    until_state(page, "ready")
    assert page.inner_text("#examples button") == SQUARE
    page.click("#examples button")
    until_state(page, "playing")
    assert shows(page, 1)
    frames = [picture(page)]
    page.fill("#prompt", CIRCLE)
    page.press("#prompt", "Enter")
    flag = page.wait_for_selector(".flag")
    promised = int(page.get_attribute(".chunk:has(.flag)", "data-chunk"))
    assert page.inner_text('#history [data-kind="promised"] .when') == f"at chunk {promised}"
    while frames[-1][0] <= promised + 1:
        frames.append(picture(page))
    assert "applied" in flag.get_attribute("class")
    assert page.inner_text('#history [data-kind="applied"] .when >> nth=0') == f"chunk {promised}"
    before = [observe(pixels) for chunk, _, pixels in frames if chunk < promised]
    after = [observe(pixels) for chunk, _, pixels in frames if chunk > promised]
    assert {(seen.ground, seen.colour) for seen in before} == {("black", "yellow")}
    assert all(seen.shape == "square" for seen in before[-3:])
    assert {seen.ground for seen in after} == {"white"}
    # Within the promised chunk the picture turns; its last frame has turned.
    last = [observe(pixels) for chunk, _, pixels in frames if chunk == promised][-1]
    assert last.ground == "white"


@pytest.mark.parametrize("query", ["", "?format=jpeg"])
def test_both_formats_show_the_same(
    server: RunningServer, open_page: Callable[..., playwright.Page], query: str
) -> None:
    page = open_page(server.url + query)
    begin(page, "a red fox")
    until_state(page, "playing")
    assert shows(page, 2)
    chunk, frame, pixels = picture(page)
    page.keyboard.press("Escape")  # from the prompt too
    until_state(page, "ready")
    with StreamClient(server.url) as client:
        client.start("a red fox", seed=7, format="jpeg")
        client.chunk(chunk)
    file = next(entry.payload for entry in client.frames if entry.frame == frame)
    expected = np.asarray(Image.open(io.BytesIO(file)))
    assert pixels.shape == expected.shape
    assert np.abs(pixels.mean((0, 1)) - expected.mean((0, 1))).max() < 8
    assert np.abs(pixels.astype(int).mean(-1) - expected.astype(int).mean(-1)).mean() < 12


def test_pause_and_resume_by_keyboard(
    server: RunningServer, open_page: Callable[..., playwright.Page]
) -> None:
    page = open_page(server.url)
    begin(page, "a red fox")
    until_state(page, "playing")
    assert shows(page, 2)
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Space")
    until_state(page, "paused")
    page.wait_for_timeout(200)
    before = picture(page)
    page.wait_for_timeout(600)
    after = picture(page)
    assert before[:2] == after[:2] and np.array_equal(before[2], after[2])
    page.keyboard.press("Space")
    until_state(page, "playing")
    assert shows(page, before[0] + 3)
    assert page.inner_text("#r-dropped") == "0"


def test_two_play_and_the_third_comes_in_when_one_leaves(
    server: RunningServer, open_page: Callable[..., playwright.Page]
) -> None:
    pages = [open_page(server.url) for _ in range(3)]
    for page in pages[:2]:
        begin(page, "a red fox")
        until_state(page, "playing")
    begin(pages[2], "snow")
    until_state(pages[2], "queued")
    assert "number 1 in the queue" in pages[2].inner_text("#veil-text")
    pages[0].close()
    until_state(pages[2], "playing")
    assert shows(pages[2], 1) and shows(pages[1], 2)


def test_a_refusal_is_shown(server: RunningServer, open_page: Callable[..., playwright.Page]) -> None:
    page = open_page(server.url)
    until_state(page, "ready")
    page.evaluate("document.getElementById('prompt').removeAttribute('maxlength')")
    begin(page, "x" * 3000)
    until_state(page, "ready")
    page.wait_for_selector('#history [data-kind="refused"]')
    assert "the prompt has 3000 characters; at most 2000 are taken" in page.inner_text("#veil-text")


def test_a_slow_client_is_told_what_it_misses(
    server: RunningServer, open_page: Callable[..., playwright.Page]
) -> None:
    page = open_page(server.url)
    begin(page, "a red fox")
    until_state(page, "playing")
    page.evaluate(
        """window.busy = setInterval(() => {
            const end = performance.now() + 400;
            while (performance.now() < end);
        }, 410)"""
    )
    page.wait_for_selector('.chunk[data-kind="dropped"]', timeout=20_000)
    page.evaluate("clearInterval(window.busy)")
    assert int(page.inner_text("#r-dropped")) > 0
    reached = shown(page)
    assert shows(page, reached + 4)  # it plays on


def test_skipping_what_is_queued(server: RunningServer, open_page: Callable[..., playwright.Page]) -> None:
    page = open_page(server.url)
    begin(page, "a red fox")
    until_state(page, "playing")
    assert shows(page, 2)
    page.check("#at-once")
    page.fill("#prompt", "snow in sea")
    page.press("#prompt", "Enter")
    page.wait_for_selector(".flag.applied")
    promised = int(page.get_attribute(".chunk:has(.flag)", "data-chunk"))
    assert shows(page, promised)


def test_a_server_that_comes_back(
    small_bundle: Path, tmp_path: Path, open_page: Callable[..., playwright.Page]
) -> None:
    def settings(port: int) -> Settings:
        limits = Limits(request_burst=10_000)
        return Settings(
            bundle=small_bundle, port=port, threads=1, videos=tmp_path, drain_seconds=0.0, limits=limits
        )

    with running(settings(0)) as server:
        page = open_page(server.url)
        begin(page, "a red fox")
        until_state(page, "playing")
        assert shows(page, 2)
    until_state(page, "lost")
    assert "Trying again" in page.inner_text("#veil-text")
    with running(settings(int(server.url.rpartition(":")[2]))):
        until_state(page, "playing")
        assert shows(page, 1)
        page.click("#stop")
        until_state(page, "ready")


def test_a_token_is_asked_for(start_server: StartServer, open_page: Callable[..., playwright.Page]) -> None:
    server = start_server(token="correct-horse-battery")
    page = open_page(server.url)
    page.wait_for_selector("#token-dialog[open]")
    page.fill("#token", "wrong-horse-battery")
    page.click("#token-dialog button")
    page.wait_for_selector("#token-dialog[open]")
    assert "not accepted" in page.inner_text("#token-text")
    page.fill("#token", "correct-horse-battery")
    page.keyboard.press("Enter")
    begin(page, "a red fox")
    until_state(page, "playing")
    assert shows(page, 1)


def test_a_switch_is_offered_what_the_bundle_can(
    server: RunningServer, open_page: Callable[..., playwright.Page]
) -> None:
    page = open_page(server.url)
    until_state(page, "ready")
    modes = page.evaluate(
        "[...document.querySelector('#recache').options].filter(o => !o.disabled).map(o => o.value)"
    )
    assert set(modes) == {"all", "window", "none", "flush", "cut"}
    assert page.evaluate("document.querySelector('#recache').value") == "window"


def test_phone_width_and_keyboard(server: RunningServer, open_page: Callable[..., playwright.Page]) -> None:
    page = open_page(server.url, viewport={"width": 360, "height": 740})
    until_state(page, "ready")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for name in ("#screen", "#prompt", "#go", "#pause", "#stop"):
        box = page.locator(name).bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 360, name
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    for name in ("seed", "prompt", "go", "strip"):
        assert name in reached
    page.focus("#prompt")
    page.keyboard.type("a red fox")
    page.keyboard.press("Enter")
    until_state(page, "playing")
    begun = time.monotonic()
    assert shows(page, 1, 20) and time.monotonic() - begun < 20


def test_the_page_over_webrtc(
    server: RunningServer, open_page: Callable[..., playwright.Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    aioice = pytest.importorskip("aioice.ice", reason="aiortc is not installed (extra webrtc)")
    monkeypatch.setattr(aioice, "get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])
    page = open_page(f"{server.url}/?transport=webrtc")
    begin(page, "a red fox")
    until_state(page, "playing")
    assert shows(page, 2)
    first = picture(page)[2]
    assert first.std() > 5  # something is drawn
    page.fill("#prompt", "snow in sea")
    page.press("#prompt", "Enter")
    page.wait_for_selector(".flag.applied")
    page.click("#stop")
    until_state(page, "ready")
    assert not np.array_equal(first, picture(page)[2])
