"""Whether a server's answers at temperature 0 are those of the target alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from core.config import Config
from core.data.conversations import Message
from core.data.template import encode_prompt
from core.decode.engine import SpeculativeDecoder
from core.decode.requests import Request
from core.decode.sampling import SamplingSettings
from core.evaluate.speculation import NEAR_TIE
from core.models.target import load_target
from core.progress import Progress
from core.runtime.load.client import Reply


def check_equality(config: Config, replies: Sequence[Reply], threads: int) -> Mapping[str, Any]:
    """Answer the same questions plainly, one at a time, and compare the texts.

    Args:
        config: section target, and decode's context; nothing is drafted.
        replies: whole answers.
        threads: of torch.
    Returns:
        total, identical, near_tie (the target's two best tokens are too close for rounding, where
        the text first differs), and differences: prompt, both texts and that gap.
    """
    target = load_target(config.target, threads)
    decode = config.decode.model_copy(update={"total_tokens": 1, "temperature": 0.0})
    decoder = SpeculativeDecoder(target, None, decode)
    settings = SamplingSettings(logprobs=2)
    identical, differences = 0, list[dict[str, Any]]()
    with Progress("load_test", len(replies), "answers compared") as progress:
        for reply in replies:
            ids = encode_prompt(target.tokenizer, [Message("user", reply.question.prompt)])
            request = Request(ids, reply.question.max_tokens, settings)
            rounds = [event.round for event in decoder.stream(request)]
            tokens = [token for one in rounds for token in one.tokens]
            text = str(target.tokenizer.decode(tokens, skip_special_tokens=True))
            if text == reply.text:
                identical += 1
            else:
                scores = [score for one in rounds for score in one.logprobs]
                place = _first_difference(target.tokenizer, tokens, reply.text)
                best, second = (value for _, value in scores[place].top[:2])
                differences.append(
                    {
                        "prompt": reply.question.prompt,
                        "served": reply.text,
                        "plain": text,
                        "gap": best - second,
                    }
                )
            progress.advance(tokens=len(tokens))
    near = sum(one["gap"] < NEAR_TIE for one in differences)
    return {
        "total": len(replies),
        "identical": identical,
        "near_tie": near,
        "differences": differences,
    }


def _first_difference(tokenizer: Any, tokens: Sequence[int], text: str) -> int:
    """The place of the first token with which the text is no longer the other one's beginning."""
    for place in range(len(tokens)):
        if not text.startswith(_shown(tokenizer, tokens[: place + 1])):
            return place
    return len(tokens) - 1


def _shown(tokenizer: Any, tokens: Sequence[int]) -> str:
    # Half a character is not yet a difference.
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).rstrip(
        "\N{REPLACEMENT CHARACTER}"
    )
