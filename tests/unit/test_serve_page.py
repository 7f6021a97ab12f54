"""The chat page: it is whole, and its policy lets run what is in it and nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from serve.page import WEB, chat_page

PAGE = chat_page()


class Elements(HTMLParser):
    """Tags with their attributes, and what inline styles and scripts hold."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.content: dict[str, list[str]] = {"style": [], "script": []}
        self._in: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._in = tag if tag in self.content else None

    def handle_endtag(self, tag: str) -> None:
        self._in = None

    def handle_data(self, data: str) -> None:
        if self._in is not None:
            self.content[self._in].append(data)


@pytest.fixture(scope="module")
def elements() -> Elements:
    elements = Elements()
    elements.feed(PAGE.text)
    return elements


def directive(name: str) -> list[str]:
    found = dict(part.strip().split(" ", 1) for part in PAGE.policy.split(";"))
    return found[name].split()


@pytest.mark.parametrize(("tag", "files"), [("style", "*.css"), ("script", "*.js")])
def test_what_the_files_hold_may_run_and_nothing_else(
    elements: Elements, tag: str, files: str
) -> None:
    texts = elements.content[tag]
    wanted = sorted(path.read_text(encoding="utf-8") for path in WEB.glob(files))
    assert sorted(text.removeprefix("\n") for text in texts) == wanted, "each file, once"
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
    assert directive(f"{tag}-src") == [f"'sha256-{one}'" for one in hashes]
    assert "unsafe" not in PAGE.policy and directive("default-src") == ["'none'"]


def test_nothing_comes_from_elsewhere(elements: Elements) -> None:
    for tag, attributes in elements.found:
        assert not {"style", "src"} & attributes.keys() and not any(
            name.startswith("on") for name in attributes
        ), f"<{tag}> would be blocked"
        assert (attributes.get("href") or "data:").startswith("data:")
    namespace = "http://www.w3.org/2000/svg"
    assert not re.findall(r"(?:https?:)?//[\w.]+\.\w+", PAGE.text.replace(namespace, ""))


def test_every_control_has_a_name(elements: Elements) -> None:
    labelled = {attributes.get("for") for tag, attributes in elements.found if tag == "label"}
    inside = re.findall(r"<label[^>]*>[^\n]*?id=\"([\w-]+)\"", PAGE.text)
    for tag, attributes in elements.found:
        if tag in ("input", "select", "textarea"):
            name = attributes["id"]
            assert attributes.get("aria-label") or name in labelled or name in inside, name
