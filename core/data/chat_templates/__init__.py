"""Chat templates of model families, for tokenizers that come without one.

Written from the formats that their makers published: Llama 2 (`llama/generation.py`), Vicuna 1.1
(FastChat's `conversation.py`), Mixtral-8x7B-Instruct's, Llama 3's and Qwen2's model cards.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from core.config.sections import TemplateName
from core.errors import MismatchError

AUTO: TemplateName = "auto"
BUILT_IN: tuple[str, ...] = tuple(name for name in get_args(TemplateName) if name != AUTO)

# Tokens without which a template would be read as plain text; None stands for bos and eos.
NEEDS: dict[str, tuple[str, ...] | None] = {
    "llama-2": None,
    "vicuna": None,
    "mixtral": None,
    "llama-3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "qwen-2": ("<|im_start|>", "<|im_end|>"),
}


def built_in_template(name: str) -> str:
    """The source of a family's template."""
    return (Path(__file__).parent / f"{name}.jinja").read_text("utf-8").strip()


def use_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Give the tokenizer a family's template; `auto` leaves it its own.

    Raises:
        MismatchError: the tokenizer lacks tokens that the template is made of.
    """
    if name == AUTO:
        return
    needed = NEEDS[name]
    if needed is None:
        given = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
        missing = [token for token, value in given.items() if not value]
    else:
        known = tokenizer.get_vocab()
        missing = [token for token in needed if token not in known]
    if missing:
        raise MismatchError(
            f"target.template={name}: the tokenizer {tokenizer.name_or_path!r} has no "
            f"{', '.join(missing)}, so that template is not this model's; use its own (auto), or "
            f"another of {', '.join(BUILT_IN)}"
        )
    tokenizer.chat_template = built_in_template(name)
