"""The chat page: one answer of HTTP, made of the files in `web/`; nothing comes from elsewhere.

Its policy lets run what the files hold, by their hashes, and nothing else: neither a script that
would be smuggled into the page nor one of another server.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

WEB = Path(__file__).parent / "web"
# Where a file's content goes.
PLACE = re.compile(r"<(style|script)>([\w-]+\.(?:css|js))</\1>")


@dataclass(frozen=True)
class ChatPage:
    """A page and the Content-Security-Policy to send with it."""

    text: str
    policy: str


def chat_page() -> ChatPage:
    """Put the page together."""
    hashes: dict[str, list[str]] = {"style": [], "script": []}

    def content(place: re.Match[str]) -> str:
        tag = place[1]
        text = f"\n{(WEB / place[2]).read_text(encoding='utf-8')}"
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[tag].append(f"'sha256-{digest}'")
        return f"<{tag}>{text}</{tag}>"

    text = PLACE.sub(content, (WEB / "index.html").read_text(encoding="utf-8"))
    return ChatPage(
        text,
        "default-src 'none'; connect-src 'self'; img-src data:; "
        f"script-src {' '.join(hashes['script'])}; style-src {' '.join(hashes['style'])}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    )
