"""The chat page in a real browser: Debian's Chromium, headless, against a running server.

All of it by keyboard: what can be done without a mouse, these tests do without one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import BrowserContext, Locator, Page, Request, expect

from tests.e2e.browsing import NUM_TOKENS, SIZES, limit_answers, needs_chromium, send, tab_to
from tests.e2e.serving import PROMPTS, Served

# For whoever wants to look at the page: a folder where the tests leave pictures of it.
PICTURES = os.environ.get("AERIE_TEST_PICTURES")
# What is drawn of a round's tree, and what is said of it.
TREE = """() => {
    const tree = document.querySelector("#tree");
    const count = (found) => tree.querySelectorAll(found).length;
    const ends = [...tree.querySelectorAll("g.root, g.kept"), ...tree.querySelectorAll("g.own")];
    const end = ends.at(-1).querySelector("rect").getBoundingClientRect();
    const frame = tree.querySelector("#canvas").getBoundingClientRect();
    return {
        seen: end.top >= frame.top && end.bottom <= frame.bottom && end.right <= frame.right,
        kept: count("g.kept"), own: count("g.own"), root: count("g.root"),
        edges: count("path.kept"),
        place: tree.querySelector("#place").textContent,
        said: tree.querySelector("#said").textContent,
        label: tree.querySelector("svg").getAttribute("aria-label"),
    };
}"""
# Notes how many panes were being answered at a time.
WATCH = """() => {
    window.mostBusy = 0;
    new MutationObserver(() => {
        window.mostBusy = Math.max(mostBusy, document.querySelectorAll(".pane.busy").length);
    }).observe(document.body, { subtree: true, attributes: true, childList: true });
}"""
OVERFLOW = "document.documentElement.scrollWidth > document.documentElement.clientWidth"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.e2e,
    pytest.mark.cluster,
    pytest.mark.slow,
    needs_chromium,
]


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


def ended(page: Page, number: int) -> Locator:
    """The answer to a question, when it is complete."""
    turn = page.locator(".turn.assistant").nth(number)
    expect(turn.locator(".figures").last).to_contain_text(f"{NUM_TOKENS} tokens")
    expect(page.locator("[aria-busy]")).to_have_count(0)
    return turn


def questions(page: Page) -> list[dict[str, Any]]:
    """Grows by what is asked."""
    asked: list[dict[str, Any]] = []

    def note(request: Request) -> None:
        if request.url.endswith("/chat/completions"):
            asked.append(request.post_data_json)

    page.on("request", note)
    return asked


def check_compared(turn: Locator) -> tuple[Locator, Locator]:
    """Both panes are complete, and agree; the speculative one and the other."""
    expect(turn.locator(".verdict")).to_contain_text("Both texts are the same.")
    guessed, alone = turn.locator(".pane").all()
    for pane in (guessed, alone):
        expect(pane.locator(".figures")).to_contain_text("tokens/s")
        expect(pane.locator(".figures")).to_contain_text(f"{NUM_TOKENS} tokens")
    assert guessed.locator(".body").inner_text() == alone.locator(".body").inner_text()
    assert alone.locator(".drafted").count() == 0
    assert "τ 1.00" in alone.locator(".figures").inner_text()
    return guessed, alone


def check_guessed(pane: Locator) -> None:
    """Some tokens are coloured."""
    guessed = pane.locator(".drafted").first
    plain = guessed.evaluate("node => getComputedStyle(node.parentNode).backgroundColor")
    assert guessed.evaluate("node => getComputedStyle(node).backgroundColor") != plain


def check_tree(page: Page) -> None:
    """Every round of the answer can be looked at, one of them with an accepted guess."""
    tab_to(page, "Draft tree of round")
    page.keyboard.press("Home")
    expect(page.locator("#place")).to_contain_text("1 of ")
    rounds = int(page.locator("#round").get_attribute("max") or 0)
    assert rounds > 1
    most = 0
    for number in range(1, rounds + 1):
        shown = page.evaluate(TREE)
        assert shown["place"] == f"{number} of {rounds}"
        kept, own, said = shown["kept"], shown["own"], shown["said"]
        # Each kept guess, and the model's own token behind it, has an edge that leads to it.
        assert shown["edges"] == kept + own and own <= 1 and shown["root"] == 1
        assert f"the model kept {kept or 'none'}" in said or "no tokens were guessed" in said
        assert said in shown["label"], "what is drawn is also told"
        assert shown["seen"], f"the accepted path's end is out of sight: {shown}"
        most = max(most, kept)
        page.keyboard.press("ArrowRight")
    assert most > 0, "no accepted path"


@pytest.mark.parametrize("size", SIZES)
def test_a_whole_chat_by_keyboard(page: Page, size: str) -> None:
    width, height = SIZES[size]
    page.set_viewport_size({"width": width, "height": height})
    page.emulate_media(color_scheme="dark" if size == "phone" else "light")
    asked = questions(page)
    expect(page.get_by_label("Message")).to_be_focused()
    picture(page, f"{size}-welcome")
    tab_to(page, "Settings")
    page.keyboard.press("Enter")
    tab_to(page, "Temperature")
    page.keyboard.type("0")
    picture(page, f"{size}-settings")
    page.keyboard.press("Escape")
    limit_answers(page)

    tab_to(page, "Message")
    page.keyboard.type(PROMPTS[0])
    page.keyboard.press("Shift+Enter")
    expect(page.get_by_label("Message")).to_have_value(f"{PROMPTS[0]}\n")
    page.keyboard.press("Enter")
    answer = ended(page, 0)
    expect(page.get_by_label("Message")).to_be_focused()
    expect(page.locator("#status")).to_contain_text("The answer is complete")
    assert answer.locator(".body").inner_text()
    check_guessed(answer)
    picture(page, f"{size}-answer")
    check_tree(page)
    picture(page, f"{size}-tree")

    # The next question is asked with the conversation so far.
    send(page, PROMPTS[1])
    ended(page, 1)
    assert [message["role"] for message in asked[1]["messages"]] == ["user", "assistant", "user"]
    assert asked[1]["temperature"] == 0 and asked[1]["max_tokens"] == NUM_TOKENS

    tab_to(page, "Compare")
    page.keyboard.press("Space")
    page.evaluate(WATCH)
    send(page, PROMPTS[2])
    check_compared(ended(page, 2))

    tab_to(page, "New chat")
    page.keyboard.press("Enter")
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#tree")).to_be_hidden()
    expect(page.get_by_label("Message")).to_be_focused()
    send(page, PROMPTS[0])
    guessed, alone = check_compared(ended(page, 0))
    check_guessed(guessed)
    assert "τ 1.00" not in guessed.locator(".figures").inner_text()
    picture(page, f"{size}-compare")
    check_tree(page)
    assert page.evaluate("mostBusy") == 1, "one after the other"
    ways = [body["aerie"]["speculate"] for body in asked[2:]]
    assert ways == [True, False, False, True], "who is first alternates"
    assert asked[2]["seed"] == asked[3]["seed"] and len(asked[-1]["messages"]) == 1
    first, second = (pane.bounding_box() for pane in (guessed, alone))
    assert first and second
    if size == "phone":
        assert second["y"] >= first["y"] + first["height"] and second["x"] == first["x"]
    else:
        assert second["x"] >= first["x"] + first["width"] and second["y"] == first["y"]
    assert not page.evaluate(OVERFLOW)


def test_text_is_shown_and_never_run(page: Page) -> None:
    limit_answers(page)
    markup = "<img src=x onerror=document.title='run'><b>bold</b>"
    send(page, markup)
    expect(page.locator(".turn.user .body")).to_have_text(markup)
    ended(page, 0)
    assert page.locator(".turn img, .turn b").count() == 0
    assert page.title() == "Aerie"


def test_escape_stops_an_answer_and_the_chat_goes_on(page: Page) -> None:
    limit_answers(page, 50_000)
    tab_to(page, "Compare")
    page.keyboard.press("Space")
    send(page, PROMPTS[0])
    panes = page.locator(".turn.assistant .figures")
    expect(panes.first).to_contain_text("tokens/s")
    expect(page.locator("#tree svg")).to_be_visible()
    picture(page, "running")
    page.keyboard.press("Escape")
    expect(panes.first).to_contain_text("stopped")
    expect(panes.nth(1)).to_have_text("")
    expect(page.locator("#status")).to_have_text("Stopped.")
    limit_answers(page)
    send(page, PROMPTS[1])
    ended(page, 1)


def test_a_page_without_a_tree_asks_for_none(page: Page) -> None:
    limit_answers(page)
    tab_to(page, "Settings")
    page.keyboard.press("Enter")
    tab_to(page, "Draw the draft tree")
    page.keyboard.press("Space")
    tab_to(page, "Highlight guesses")
    page.keyboard.press("Space")
    asked = questions(page)
    send(page, PROMPTS[0])
    pane = ended(page, 0)
    assert asked[0]["aerie"] == {"spans": True, "speculate": True, "tree": False}
    expect(page.locator("#tree")).to_be_hidden()
    transparent = "rgba(0, 0, 0, 0)"
    expect(pane.locator(".drafted").first).to_have_css("background-color", transparent)


def test_a_server_that_does_not_tell_of_its_rounds_sums_up_at_the_end(page: Page) -> None:
    """As with vLLM, which says neither what was guessed nor how long its rounds took."""
    parts = [
        {"choices": [{"index": 0, "aerie": {"spans": [[" Paris", None]], "tokens": 1}}]},
        {"choices": [{"index": 0, "aerie": {"spans": [[" is", None]], "tokens": 1}}]},
        {
            "choices": [{"index": 0, "finish_reason": "stop"}],
            "aerie": {"accepted_length": 2.5, "tokens_per_second": 31.4},
        },
    ]
    sent = "".join(f"data: {part}\n\n" for part in [*map(json.dumps, parts), "[DONE]"])
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=sent),
    )
    send(page, PROMPTS[0])
    pane = page.locator(".turn.assistant .pane")
    expect(pane.locator(".body")).to_have_text(" Paris is")
    expect(pane.locator(".figures")).to_have_text("31.4 tokens/s · τ 2.50 · 2 tokens")
    assert pane.locator(".drafted").count() == 0


def test_a_refusal_is_shown(browser: BrowserContext, served: Served) -> None:
    # A page of its own: Chromium logs an answer of 400 as an error, rightly.
    page = browser.new_page()
    page.goto(served.url)
    expect(page.locator("#model")).to_have_text("tiny")
    limit_answers(page, 1_000_000)
    send(page, PROMPTS[0])
    expect(page.get_by_role("alert")).to_contain_text("longest sequence")
    picture(page, "refusal")
    limit_answers(page)
    send(page, PROMPTS[0])
    ended(page, 1)
    page.close()
