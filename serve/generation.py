"""What every protocol asks of a decoder replica, and what the replica tells of its answers.

It is all that passes between ingress and replica; no protocol's names are in here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from core.decode.phases import NO_SECONDS, PhaseSeconds
from serve.text import Span

Role = Literal["system", "user", "assistant"]
Reason = Literal["string", "token", "length"]
# Stands for the logarithm of nothing, which JSON has no number for.
LEAST_LOGPROB = -9999.0


@dataclass(frozen=True)
class Conversation:
    """Messages (role, content), which go through the chat template."""

    messages: tuple[tuple[Role, str], ...]


# A conversation, a text, or a text's tokens.
Prompt = Conversation | str | tuple[int, ...]


@dataclass(frozen=True)
class Generation:
    """A request to a decoder replica; None means the server's default.

    Attributes:
        prompts: to answer, or to go on from.
        prompt_field: what the client calls them, for errors.
        choices: answers to each prompt, independent of each other; they are numbered through.
        max_new_tokens: most tokens of each.
        sampling: settings of `core.decode.sampling.SamplingSettings` by name, where given.
        seed: of each prompt's first choice; the next one has the next seed.
        stops: strings, before the first of which the text ends.
        stop_token_ids: tokens that end it; they are its last.
        echo: whether the text begins with the prompt's.
        schema: a JSON schema, as JSON, that the answers must follow.
        speculate: whether trees are drafted; without, each pass of the target gives one token.
        trees: whether the rounds' trees are told.
        name: what logs call it.
    """

    prompts: tuple[Prompt, ...]
    prompt_field: str = "messages"
    choices: int = 1
    max_new_tokens: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    stops: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    echo: bool = False
    schema: str | None = None
    speculate: bool = True
    trees: bool = False
    name: str = ""

    @property
    def num_answers(self) -> int:
        return len(self.prompts) * self.choices


@dataclass(frozen=True)
class Rejected:
    """The only event of a request that is not served.

    Attributes:
        status: of HTTP.
        retry_after_s: when the same request may find room; None if it never will.
    """

    message: str
    param: str | None = None
    code: str | None = None
    status: int = 400
    retry_after_s: int | None = None


@dataclass(frozen=True)
class Failed:
    """Last event of a request that the decoder could not finish.

    Attributes:
        again: whether asking once more helps: the draft head was one on trial.
    """

    message: str
    again: bool = False


@dataclass(frozen=True)
class Accepted:
    """First event: the request waits for its turn or is at work.

    Attributes:
        prompt_tokens: of all prompts together.
    """

    prompt_tokens: int


@dataclass(frozen=True)
class Restarted:
    """The replica died after `Accepted`, and another one takes the request over."""


@dataclass(frozen=True)
class ScoredToken:
    """A token and the target's log-probability of it, and of the likeliest in its place.

    Attributes:
        logprob: as those of `top`, LEAST_LOGPROB or more.
        special: whether it stays out of the answer's text.
    """

    id: int
    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]
    special: bool = False


@dataclass(frozen=True)
class Tokens:
    """What `tokenize` gives, and the longest sequence that the model takes."""

    ids: tuple[int, ...]
    longest: int


@dataclass(frozen=True)
class ShownTree:
    """A round's draft tree, to look at.

    Attributes:
        parents: of each node, always an earlier one; -1 for the root, the token before the round.
        texts: of each node's token by itself; half a character is U+FFFD.
        accepted: the nodes whose tokens the answer got, from the root on, which it had.
        bonus: text of the target's own token behind them; None where the answer ended before it.
    """

    parents: tuple[int, ...]
    texts: tuple[str, ...]
    accepted: tuple[int, ...]
    bonus: str | None


@dataclass(frozen=True)
class Speculated:
    """What was drafted for a choice, where the backend tells it at the end alone.

    Attributes:
        drafts: that were verified.
        draft_tokens: of all of them together.
        accepted_per_place: how many of the first, the second, … tokens were kept.
    """

    drafts: int
    draft_tokens: int
    accepted_per_place: tuple[int, ...]


@dataclass(frozen=True)
class Progressed:
    """One round of a choice, or several where the backend does not tell them apart.

    Attributes:
        choice: which, from 0.
        spans: its text, which may be none yet.
        ids: its tokens.
        tree_size: of its draft tree; 0 for the prompt's pass; None where it is not known.
        tokens: the same, where log-probabilities were asked for.
        num_guessed: how many of them had been guessed: the first ones; None as well.
        seconds: of the rounds since the event before; None as well.
        tree: its draft tree, where trees were asked for.
    """

    choice: int
    spans: tuple[Span, ...]
    ids: tuple[int, ...]
    tree_size: int | None
    tokens: tuple[ScoredToken, ...] = ()
    num_guessed: int | None = 0
    seconds: PhaseSeconds | None = NO_SECONDS
    tree: ShownTree | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.spans)


@dataclass(frozen=True)
class Finished:
    """Last event of a choice. What the backend does not tell is None.

    Attributes:
        choice: which, from 0.
        reason: `string` and `token` are what ended it by itself, `length` its limit.
        rounds: target passes after the prompt's.
        accepted_length: τ, tokens that such a pass committed on average.
        tokens_per_second: from the start of the prefill; waiting for a turn does not count.
        tree_size: nodes that such a pass verified on average.
        seconds: of all rounds.
    """

    choice: int
    reason: Reason
    completion_tokens: int
    rounds: int | None
    accepted_length: float | None
    tokens_per_second: float | None
    tree_size: float | None = 1.0
    seconds: PhaseSeconds | None = NO_SECONDS

    @property
    def openai_reason(self) -> Literal["stop", "length"]:
        """The same in OpenAI's words."""
        return "length" if self.reason == "length" else "stop"


Event = Rejected | Accepted | Progressed | Finished | Failed | Restarted | Speculated
