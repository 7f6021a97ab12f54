"""What the tests of the page do in a browser, all of it by keyboard."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SIZES = {"desktop": (1100, 760), "phone": (390, 780)}
NUM_TOKENS = 60
# What the element with the focus is called, and whether it can be seen to have it.
FOCUS = """() => {
    const node = document.activeElement;
    const name = node.ariaLabel || node.labels?.[0]?.textContent || node.textContent;
    const style = getComputedStyle(node);
    return [name.trim(), style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2];
}"""

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no `chromium` on this machine; `make test-setup` installs it"
)


@contextmanager
def chromium(profile: Path) -> Iterator[BrowserContext]:
    """A headless browser of desktop size, whose profile is in a folder."""
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=CHROMIUM,
            headless=True,
            args=FLAGS,
            viewport={"width": SIZES["desktop"][0], "height": SIZES["desktop"][1]},
        )
        context.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        yield context
        context.close()


def tab_to(page: Page, name: str) -> None:
    """Press Tab until the focus is there; wherever it comes by, it can be seen."""
    passed = []
    for _ in range(30):
        focused, seen = page.evaluate(FOCUS)
        if focused.startswith(name):
            return
        passed.append(focused)
        page.keyboard.press("Tab")
        focused, seen = page.evaluate(FOCUS)
        # Behind the last one the focus leaves the page.
        assert seen or page.evaluate("document.activeElement === document.body"), focused
    raise AssertionError(f"Tab does not lead to {name!r}, but to {passed}")


def limit_answers(page: Page, num_tokens: int = NUM_TOKENS) -> None:
    if page.locator("#settings").is_hidden():
        tab_to(page, "Settings")
        page.keyboard.press("Enter")
    tab_to(page, "Longest answer")
    page.keyboard.press("Control+A")
    page.keyboard.type(str(num_tokens))
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    expect(page.locator("#toggle")).to_be_focused()


def send(page: Page, text: str) -> None:
    tab_to(page, "Message")
    page.keyboard.type(text)
    page.keyboard.press("Enter")
