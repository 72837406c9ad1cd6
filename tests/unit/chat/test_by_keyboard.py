"""The page without a mouse, in headless Chromium; where Gradio, Playwright and a Chromium are (``make chat-test``)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.unit.chat.test_chat import ct, export, page  # noqa: F401  (fixtures)

pytest.importorskip("gradio")  # before an export is made for nothing
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FOCUS = """() => {
  const e = document.activeElement, s = getComputedStyle(e);
  const says = (e.getAttribute('aria-label') || e.placeholder || e.innerText).trim();
  return [e === document.body, says, `${s.outlineStyle} ${s.outlineWidth}`];
}"""


@pytest.fixture
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium.new_page(viewport={"width": 1100, "height": 800})
        chromium.close()


def tab_to(browser: Any, words: str) -> None:
    """Press Tab until something is in focus that says this, whose ring is seen at every stop."""
    stops = []
    for _ in range(12):
        browser.keyboard.press("Tab")
        is_body, says, ring = browser.evaluate(FOCUS)
        stops.append(says)
        assert is_body or ring == "solid 3px", says
        if says.startswith(words):
            return
    raise AssertionError(f"{words!r} is not among {stops}")


def test_a_picture_is_opened_and_asked_about_by_keyboard_alone(page, export, ct, browser, tmp_path):  # noqa: F811
    address, _, _ = page
    choosers: list[Any] = []
    browser.on("filechooser", lambda chooser: choosers.append(chooser))
    browser.goto(address)
    browser.wait_for_selector("textarea")
    browser.wait_for_timeout(1000)

    def choose(file: Path) -> None:
        tab_to(browser, "Open an image")
        browser.keyboard.press("Enter")
        browser.wait_for_timeout(500)
        choosers.pop().set_files(file)

    (tmp_path / "notes.txt").write_text("no picture")
    choose(tmp_path / "notes.txt")
    browser.wait_for_selector("text=not an image")
    browser.wait_for_timeout(11_000)
    assert browser.is_visible("text=not an image"), "it stays until it is closed"
    tab_to(browser, "Close")
    browser.keyboard.press("Enter")
    browser.wait_for_selector("text=not an image", state="detached")

    Image.new("RGB", (60, 40), (90, 90, 90)).save(tmp_path / "grey.png")
    choose(tmp_path / "grey.png")
    browser.wait_for_function("[...document.querySelectorAll('textarea')].some(e => e.value.includes('60 × 40'))")
    tab_to(browser, "What does")
    browser.keyboard.type("What does the image show?")
    browser.keyboard.press("Shift+Enter")
    browser.keyboard.type("Be short.")
    browser.keyboard.press("Enter")
    browser.wait_for_function(
        "[...document.querySelectorAll('textarea')].at(-1).value || document.body.innerText.includes('answer is empty')"
    )
    asked = browser.evaluate("[...document.querySelectorAll('textarea')].map(e => e.value)")
    assert "What does the image show?\nBe short." in asked
