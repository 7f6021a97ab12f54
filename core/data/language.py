"""Which language a conversation is in."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from core.data.conversations import Message

# Enough to tell, and reading all of a long conversation would take as long as tokenizing it.
CHARACTERS = 1000


def language_of(messages: Sequence[Message]) -> str:
    """ISO 639-1 code of the conversation's beginning: `en`, `zh`, …."""
    text = ""
    for message in messages:
        if message.role in ("user", "assistant"):
            text = f"{text}\n{message.content[:CHARACTERS]}" if text else message.content
        if len(text) >= CHARACTERS:
            break
    language, _ = _identifier().classify(text[:CHARACTERS])
    return str(language)


@functools.cache
def known_languages() -> frozenset[str]:
    """All codes that `language_of` can give."""
    return frozenset(_identifier().labels)


@functools.cache
def _identifier() -> Any:
    # Loads its model, of some megabytes: only where a run asks for languages.
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)
