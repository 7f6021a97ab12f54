"""pydantic's findings as messages in terms of the configuration's sections and fields."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from pydantic import ValidationError

from core.config.base import Section
from core.config.draft import DRAFT_CONFIGS


def explain(error: ValidationError, schema: type[Section]) -> str:
    """All findings in one line.

    Args:
        error: of a config's validation.
        schema: the config's class, whose fields are its sections.
    """
    messages = []
    for problem in error.errors():
        location = [str(part) for part in problem["loc"] if part not in DRAFT_CONFIGS]
        # A union's branches (`int`, `literal['auto']`) are part of pydantic's place, not of ours.
        dotted = ".".join(location[:2])
        if problem["type"] == "extra_forbidden":
            hint = _suggest(location, problem["loc"], schema)
            messages.append(f"unknown key {dotted}{hint}")
        elif problem["type"] == "value_error":
            messages.append(str(problem["ctx"]["error"]))
        else:
            got = problem.get("input")
            messages.append(f"{dotted}={got!r}: {problem['msg'][:1].lower()}{problem['msg'][1:]}")
    return "; ".join(messages)


def _suggest(location: list[str], place: tuple[int | str, ...], schema: type[Section]) -> str:
    kind = next((part for part in place if part in DRAFT_CONFIGS), None)
    if len(location) == 1:
        known: Iterable[str] = schema.model_fields
    elif isinstance(kind, str):
        known = DRAFT_CONFIGS[kind].model_fields
    elif location[0] in schema.model_fields:
        known = type(getattr(schema(), location[0])).model_fields
    else:
        return ""
    close = difflib.get_close_matches(location[-1], known, n=1)
    if close:
        return f"; did you mean {'.'.join([*location[:-1], close[0]])}?"
    return f"; known here: {', '.join(known)}"
