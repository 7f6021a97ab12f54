"""A server that asks for keys, as the terminal chat and the page meet it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from playwright.sync_api import BrowserContext, expect

from serve.keys import key_hash
from tests.e2e.browsing import needs_chromium
from tests.e2e.serving import ROOT
from tests.in_process import in_process, listening

pytestmark = [pytest.mark.e2e]
TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with in_process(tmp_path_factory.mktemp("keys")) as service:
        with listening(service.configured(api_keys=(key_hash("open sesame"),))) as url:
            yield url


def chat(url: str, key: str | None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MY_KEY": key or ""}
    return subprocess.run(
        [sys.executable, "-m", "serve.chat", "--url", url, "--max-tokens", "8"]
        + ["--key-env", "MY_KEY"] * (key is not None),
        input="Hello!\n/stats\n/quit\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=TIMEOUT_S,
        check=False,
    )


def test_the_terminal_chat_sends_a_key(url: str) -> None:
    done = chat(url, "open sesame")
    assert done.returncode == 0, done.stderr
    assert "accepted length" in done.stdout


@pytest.mark.parametrize("key", [None, "wrong"])
def test_the_terminal_chat_says_that_a_key_is_missing(url: str, key: str | None) -> None:
    done = chat(url, key)
    assert done.returncode == 1
    assert "asks for an API key" in done.stderr
    assert ("MY_KEY" if key else "AERIE_API_KEY") in done.stderr


@needs_chromium
@pytest.mark.browser
def test_the_page_asks_for_a_key_and_chats_with_it(url: str, browser: BrowserContext) -> None:
    page = browser.new_page()
    page.goto(url)
    expect(page.locator("#model")).to_contain_text("asks for an API key")
    page.locator("#key").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#send")).to_be_disabled()
    page.locator("#key").fill("open sesame")
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_have_text("tiny")
    page.locator("#max-tokens").fill("8")
    page.locator("#input").fill("Hello!")
    page.keyboard.press("Enter")
    expect(page.locator(".turn.assistant .figures")).to_contain_text("tokens/s")
    page.reload()
    expect(page.locator("#model")).to_have_text("tiny")
    page.close()
