"""A target that answers every user turn of conversations itself, and makes up such turns."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile

from core.config import GenerateConfig
from core.data.conversations import ROLES, Conversation, Message
from core.data.synthesis import user_turn
from core.data.template import encode_prompt
from core.decode.batch import Answer, BatchCounts, BatchGenerator, Request
from core.decode.sampling import SamplingSettings
from core.errors import ConfigError
from core.models.target import Target

# Why a conversation ends before a turn: the answer was cut, was empty, or would not fit.
CUT, EMPTY, NO_ROOM = "cut", "empty", "no_room"
# What was generated, and what of it was kept.
GENERATED, ANSWERS = "generated", "answers"


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
    """

    def __init__(self, target: Target, config: GenerateConfig, context: int) -> None:
        """Get ready.

        Args:
            target: loaded.
            config: sampling, lengths, batch.
            context: most tokens of a conversation.
        """
        self.target, self.config = target, config
        self.context = min(context, target.max_position)
        settings = SamplingSettings(config.temperature, config.top_p, config.top_k)
        self._generator = BatchGenerator(target, settings, config.batch_size)
        self.counts: Counter[str] = Counter()

    @property
    def computed(self) -> BatchCounts:
        """What it took."""
        return self._generator.counts

    def answer(self, conversations: Sequence[Conversation]) -> list[Conversation]:
        """Answer each user turn, with the answers before it as context.

        A conversation ends before a turn that finds no answer, and is left out if that is its
        first. What is said depends on the conversation's id and on the seed, not on the others.
        """
        dialogues = [_Dialogue(conversation) for conversation in conversations]

        def next_request(number: int) -> Request | None:
            return self._request(number, dialogues[number]) if dialogues[number].ask() else None

        def follow_up(request: Request, answer: Answer) -> Request | None:
            content = self._content(answer)
            if content is None:
                return None
            dialogues[request.key].messages.append(Message("assistant", content))
            return next_request(request.key)

        requests = [next_request(number) for number in range(len(dialogues))]
        self._generator.run([r for r in requests if r is not None], follow_up)
        found = [dialogue.answered() for dialogue in dialogues]
        return [conversation for conversation in found if conversation is not None]

    def _request(self, number: int, dialogue: _Dialogue) -> Request | None:
        ids = encode_prompt(self.target.tokenizer, dialogue.messages)
        most = self.config.max_new_tokens
        if len(ids) + most > self.context:
            self.counts[NO_ROOM] += 1
            return None
        seed = seed_of(self.config.seed, dialogue.conversation.id, dialogue.turn)
        return Request(number, ids, most, seed)

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
    if longest > target.max_position:
        raise ConfigError(
            f"generate.max_prompt_tokens={config.max_prompt_tokens}: the target takes "
            f"{target.max_position} tokens; lower it"
        )
    settings = SamplingSettings(config.prompt_temperature, config.prompt_top_p)
    generator = BatchGenerator(target, settings, config.batch_size, turn.stop_token_ids)
    found: dict[int, Answer] = {}

    def keep(request: Request, answer: Answer) -> None:
        found[request.key] = answer

    generator.run(
        [
            Request(
                number,
                turn.prefix_ids,
                config.max_prompt_tokens,
                seed_of(config.seed, "prompt", number),
            )
            for number in numbers
        ],
        keep,
    )
    answers = [found[number] for number in numbers]
    # Special tokens stay to be seen: a user does not type them.
    texts = [
        str(target.tokenizer.decode(list(answer.token_ids), skip_special_tokens=False))
        for answer in answers
    ]
    cut = [answer.cut for answer in answers]
    return list(zip(texts, cut, strict=True)), generator.counts.new_tokens


def decode(target: Target, answer: Answer) -> str:
    """The text of an answer, without white space around it."""
    text = target.tokenizer.decode(list(answer.token_ids), skip_special_tokens=True)
    return str(text).strip()


def seed_of(seed: int, name: str, number: int) -> int:
    """A 64-bit seed that depends on all three."""
    return int(hashlib.sha256(f"{seed}/{name}/{number}".encode()).hexdigest()[:16], 16)
