"""HTML that a web page's copy left in a turn, as Markdown with its code blocks kept."""

from __future__ import annotations

import re
import warnings

from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning
from bs4.element import Tag
from markdownify import MarkdownConverter

# A turn is HTML when it begins and ends with a tag of running text. Most turns that hold tags
# talk *about* HTML, in Markdown: those are left alone.
BLOCK = "div|p|h[1-6]|ul|ol|pre|table|blockquote|section|article"
STARTS_AS_HTML = re.compile(rf"\s*<(?:{BLOCK})(?:\s[^<>]*)?>", re.IGNORECASE)
ENDS_AS_HTML = re.compile(rf"</(?:{BLOCK})>\s*\Z", re.IGNORECASE)
LANGUAGE_CLASS = re.compile(r"(?:language|lang|highlight-source)-([\w+#.-]+)")
LANGUAGE = "data-language"
BLANK_LINES = re.compile(r"\n{3,}")


def html_to_markdown(text: str) -> str:
    """Markdown of a turn that is HTML from end to end; any other text as it is.

    Buttons and captions around a code block go; its code stays as it is, in a fence that names
    the language where the page did. A page that is nested too deeply to walk through is left alone.
    """
    if "<" not in text or not (STARTS_AS_HTML.match(text) and ENDS_AS_HTML.search(text)):
        return text
    try:
        return _converted(text)
    except RecursionError:
        return text


def _converted(text: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)
        soup = BeautifulSoup(text, "html.parser")
    for button in soup.find_all(["button", "script", "style", "svg"]):
        button.decompose()
    for block in soup.find_all("pre"):
        _keep_code_alone(block)
    converter = MarkdownConverter(
        heading_style="ATX",
        bullets="-",
        escape_asterisks=False,
        escape_underscores=False,
        code_language_callback=lambda block: block.get(LANGUAGE, ""),
    )
    return BLANK_LINES.sub("\n\n", converter.convert_soup(soup)).strip()


def _keep_code_alone(block: Tag) -> None:
    code = block.find("code")
    if not isinstance(code, Tag):
        return
    found = LANGUAGE_CLASS.search(" ".join(code.get_attribute_list("class")))
    text = code.get_text()
    block.clear()
    block.string = text
    if found:
        block[LANGUAGE] = found[1]
