"""The chat page in a real browser: Debian's Chromium, headless, against a running server."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect, sync_playwright

from tests.e2e.serving import PROMPTS, Served

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
# For whoever wants to look at the page: a folder where the tests leave pictures of it.
PICTURES = os.environ.get("AERIE_TEST_PICTURES")
NUM_TOKENS = 60

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no `chromium` on this machine; `make test-setup` installs it"
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.e2e,
    pytest.mark.cluster,
    pytest.mark.slow,
    needs_chromium,
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("chromium"),
            executable_path=CHROMIUM,
            headless=True,
            args=FLAGS,
            viewport={"width": 1100, "height": 760},
        )
        context.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        yield context
        context.close()


@pytest.fixture
def page(browser: BrowserContext, served: Served) -> Iterator[Page]:
    """The page, loaded; fails the test if the page logged an error."""
    page = browser.new_page()
    complaints: list[str] = []
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    outside: list[str] = []
    page.on("request", lambda r: None if ours(r.url, served) else outside.append(r.url))
    page.goto(served.url)
    expect(page.locator("#model")).to_have_text("tiny")
    yield page
    page.close()
    assert not complaints
    assert not outside, "the page must not need anything from elsewhere"


def ours(url: str, served: Served) -> bool:
    return url.startswith((served.url, "data:"))


def picture(page: Page, name: str) -> None:
    if PICTURES:
        page.screenshot(path=Path(PICTURES) / f"{name}.png")


def limit_answers(page: Page, num_tokens: int = NUM_TOKENS) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Longest answer").fill(str(num_tokens))


def send(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def test_a_chat_with_guessed_tokens_highlighted(page: Page) -> None:
    limit_answers(page)
    send(page, PROMPTS[0])
    answer = page.locator(".turn.assistant").first
    expect(answer.locator(".figures")).to_contain_text("tokens/s")
    expect(answer).not_to_have_class("turn assistant busy")
    assert answer.locator(".body").inner_text()
    assert answer.locator(".drafted").count() > 0
    guessed = answer.locator(".drafted").first
    plain = guessed.evaluate("node => getComputedStyle(node.parentNode).backgroundColor")
    assert guessed.evaluate("node => getComputedStyle(node).backgroundColor") != plain
    assert f"{NUM_TOKENS} tokens" in answer.locator(".figures").inner_text()

    # The next question is asked with the conversation so far.
    with page.expect_request("**/v1/chat/completions") as request:
        send(page, PROMPTS[1])
    roles = [message["role"] for message in request.value.post_data_json["messages"]]
    assert roles == ["user", "assistant", "user"]
    expect(page.locator(".turn.assistant .figures").nth(1)).to_contain_text("tokens/s")
    expect(page.locator(".busy")).to_have_count(0)
    picture(page, "chat")
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 780})
    picture(page, "dark-phone")
    overflow = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
    assert not page.evaluate(overflow)

    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    picture(page, "welcome")


def test_text_is_shown_and_never_run(page: Page) -> None:
    limit_answers(page, 8)
    markup = "<img src=x onerror=document.title='run'><b>bold</b>"
    send(page, markup)
    expect(page.locator(".turn.user .body")).to_have_text(markup)
    expect(page.locator(".busy")).to_have_count(0)
    assert page.locator(".turn img, .turn b").count() == 0
    assert page.title() == "Aerie"


def test_stop_ends_an_answer_and_the_chat_goes_on(page: Page) -> None:
    limit_answers(page, 50_000)
    send(page, PROMPTS[0])
    expect(page.locator(".turn.assistant .figures")).to_contain_text("tokens/s")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".turn.assistant .figures")).to_contain_text("stopped")
    page.get_by_label("Longest answer").fill("8")
    send(page, PROMPTS[1])
    expect(page.locator(".turn.assistant .figures").nth(1)).to_contain_text("8 tokens")


def test_a_refusal_is_shown(browser: BrowserContext, served: Served) -> None:
    # A page of its own: Chromium logs an answer of 400 as an error, rightly.
    page = browser.new_page()
    page.goto(served.url)
    expect(page.locator("#model")).to_have_text("tiny")
    limit_answers(page, 1_000_000)
    send(page, PROMPTS[0])
    expect(page.get_by_role("alert")).to_contain_text("longest sequence")
    picture(page, "refusal")
    page.get_by_label("Longest answer").fill("8")
    send(page, PROMPTS[0])
    expect(page.locator(".turn.assistant .figures").nth(1)).to_contain_text("8 tokens")
    page.close()
