"""A target that answers every user turn of conversations itself, and makes up such turns."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile

from core.config import DecodeConfig, GenerateConfig
from core.data.conversations import ROLES, Conversation, Message
from core.data.synthesis import user_turn
from core.data.template import encode_prompt
from core.decode.batch import Answer, BatchCounts, answer_all
from core.decode.engine import SpeculativeDecoder
from core.decode.requests import Request
from core.decode.sampling import SamplingSettings
from core.decode.tree import PLAIN
from core.errors import ConfigError
from core.models.target import Target

# Why a conversation ends before a turn: the answer was cut, was empty, or would not fit.
CUT, EMPTY, NO_ROOM = "cut", "empty", "no_room"
# What was generated, and what of it was kept.
GENERATED, ANSWERS = "generated", "answers"
# Tokens of prompts that a pass reads: none waits for an answer, so few passes are best.
PREFILL_TOKENS = 2048


class _Dialogue:
    """A conversation in the making: the user's turns as they were, the answers new."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        known = takewhile(lambda message: message.role in ROLES, conversation.messages)
        self._asked = [message for message in known if message.role != "assistant"]
        self._position = 0
        self.turn = 0
        self.messages: list[Message] = []

    def ask(self) -> bool:
        """Go on to the user's next turn, if there is one."""
        rest = self._asked[self._position :]
        ahead = next((i for i, m in enumerate(rest, 1) if m.role == "user"), None)
        if ahead is None:
            return False
        self.messages += rest[:ahead]
        self._position += ahead
        self.turn += 1
        return True

    def answered(self) -> Conversation | None:
        """What has been answered; None if nothing has."""
        ends = [i for i, m in enumerate(self.messages, 1) if m.role == "assistant"]
        if not ends:
            return None
        source = self.conversation
        return Conversation(source.id, tuple(self.messages[: ends[-1]]), source.source)


class Answerer:
    """Answers conversations with one target.

    Attributes:
        counts: answers, and why others were left out.
        computed: what they took.
    """

    def __init__(self, target: Target, config: GenerateConfig, context: int) -> None:
        """Get ready.

        Args:
            target: loaded.
            config: sampling, lengths, batch.
            context: most tokens of a conversation.
        """
        self.target, self.config = target, config
        self._decoder = _decoder(target, config, context)
        self.context = min(context, self._decoder.longest(PLAIN))
        self._settings = SamplingSettings(config.temperature, config.top_p, config.top_k)
        self.counts: Counter[str] = Counter()
        self.computed = BatchCounts()

    def answer(self, conversations: Sequence[Conversation]) -> list[Conversation]:
        """Answer each user turn, with the answers before it as context.

        A conversation ends before a turn that finds no answer, and is left out if that is its
        first. What is said depends on the conversation's id and on the seed, not on the others.
        """
        dialogues = [_Dialogue(conversation) for conversation in conversations]

        def next_request(number: int) -> Request | None:
            return self._request(number, dialogues[number]) if dialogues[number].ask() else None

        def follow_up(number: int, answer: Answer) -> Request | None:
            content = self._content(answer)
            if content is None:
                return None
            dialogues[number].messages.append(Message("assistant", content))
            return next_request(number)

        first = ((number, next_request(number)) for number in range(len(dialogues)))
        requests = [(number, request) for number, request in first if request is not None]
        answer_all(self._decoder, requests, follow_up, self.computed)
        found = [dialogue.answered() for dialogue in dialogues]
        return [conversation for conversation in found if conversation is not None]

    def _request(self, number: int, dialogue: _Dialogue) -> Request | None:
        ids = encode_prompt(self.target.tokenizer, dialogue.messages)
        most = self.config.max_new_tokens
        if len(ids) + most > self.context:
            self.counts[NO_ROOM] += 1
            return None
        seed = seed_of(self.config.seed, dialogue.conversation.id, dialogue.turn)
        return Request(ids, most, self._settings, seed)

    def _content(self, answer: Answer) -> str | None:
        self.counts[GENERATED] += 1
        if answer.cut:
            self.counts[CUT] += 1
            if not self.config.keep_cut:
                return None
        text = decode(self.target, answer)
        if not text:
            self.counts[EMPTY] += 1
            return None
        self.counts[ANSWERS] += 1
        return text


def make_up_prompts(
    target: Target, config: GenerateConfig, numbers: Sequence[int]
) -> tuple[list[tuple[str, bool]], int]:
    """What users might ask, as the target has it.

    Returns:
        for each number, text and whether it was cut; and the tokens generated in all.
    Raises:
        ConfigError: prompts of the length asked for do not fit the target.
        TemplateError: see `core.data.synthesis.user_turn`.
    """
    turn = user_turn(target.tokenizer)
    longest = len(turn.prefix_ids) + config.max_prompt_tokens
    decoder, counts = _decoder(target, config, longest), BatchCounts()
    if longest > decoder.longest(PLAIN):
        raise ConfigError(
            f"generate.max_prompt_tokens={config.max_prompt_tokens}: behind the template's "
            f"{len(turn.prefix_ids)} tokens the target takes "
            f"{decoder.longest(PLAIN) - len(turn.prefix_ids)}; lower it"
        )
    settings = SamplingSettings(config.prompt_temperature, config.prompt_top_p)
    found: dict[int, Answer] = {}
    requests = [
        (
            number,
            Request(
                turn.prefix_ids,
                config.max_prompt_tokens,
                settings,
                seed_of(config.seed, "prompt", number),
                turn.stop_token_ids,
            ),
        )
        for number in numbers
    ]
    # There is nothing to ask after any of them.
    answer_all(decoder, requests, found.__setitem__, counts)
    answers = [found[number] for number in numbers]
    # Special tokens stay to be seen: a user does not type them.
    texts = [
        str(target.tokenizer.decode(list(answer.token_ids), skip_special_tokens=False))
        for answer in answers
    ]
    cut = [answer.cut for answer in answers]
    return list(zip(texts, cut, strict=True)), counts.new_tokens


def _decoder(target: Target, config: GenerateConfig, context: int) -> SpeculativeDecoder:
    """A plain one for sequences of up to so many tokens: the batch is what makes it fast."""
    # A sequence alone has room for its tokens and the next one's row.
    rows = max(32, context + 1)
    decoding = DecodeConfig(
        total_tokens=1,
        max_context=rows,
        cache_tokens=rows * config.batch_size,
        batch_size=config.batch_size,
        max_waiting=config.batch_size,
        prefill_chunk=PREFILL_TOKENS,
    )
    return SpeculativeDecoder(target, None, decoding)


def decode(target: Target, answer: Answer) -> str:
    """The text of an answer, without white space around it."""
    text = target.tokenizer.decode(list(answer.token_ids), skip_special_tokens=True)
    return str(text).strip()


def seed_of(seed: int, name: str, number: int) -> int:
    """A 64-bit seed that depends on all three."""
    return int(hashlib.sha256(f"{seed}/{name}/{number}".encode()).hexdigest()[:16], 16)
