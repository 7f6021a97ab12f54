"""How a response is built from a replica's events: what all protocols share."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from core.decode.phases import PhaseSeconds
from serve.generation import Finished, Progressed, ScoredToken

Json = dict[str, Any]


class Answer(ABC):
    """Builds the JSON of one response, whole or as the events of a stream."""

    def __init__(self) -> None:
        self.prompt_tokens = 0

    @abstractmethod
    def whole(self, rounds: Sequence[Progressed], finished: Sequence[Finished]) -> Json:
        """A response that is not streamed; `finished` has all choices, in order."""

    @abstractmethod
    def opening(self) -> list[Json | str]:
        """What a stream begins with."""

    @abstractmethod
    def part(self, progressed: Progressed) -> list[Json | str]:
        """What is sent of a round; none where there is nothing to send yet."""

    @abstractmethod
    def ended(self, finished: Finished) -> list[Json | str]:
        """What is sent at the end of a choice."""

    @abstractmethod
    def closing(self) -> list[Json | str]:
        """What is sent when all choices have ended."""


class OpenAIAnswer(Answer):
    """What chats and completions have in common."""

    def __init__(
        self,
        model: str,
        prefix: str,
        *,
        choices: int,
        with_spans: bool,
        with_trees: bool,
        with_usage: bool,
    ) -> None:
        super().__init__()
        self.model, self.choices = model, choices
        self.with_spans, self.with_trees, self.with_usage = with_spans, with_trees, with_usage
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._completion_tokens = 0

    @abstractmethod
    def _whole_choice(self, rounds: Sequence[Progressed], finished: Finished) -> Json:
        """A choice of a whole response, without Aerie's extension."""

    @abstractmethod
    def _part_choice(self, progressed: Progressed) -> Json:
        """A choice of a chunk."""

    @abstractmethod
    def _last_choice(self, finished: Finished) -> Json:
        """A choice of its last chunk."""

    @property
    @abstractmethod
    def _kinds(self) -> tuple[str, str]:
        """`object` of a whole response and of a chunk."""

    def whole(self, rounds: Sequence[Progressed], finished: Sequence[Finished]) -> Json:
        choices = []
        for end in finished:
            own = [one for one in rounds if one.choice == end.choice]
            choice = self._whole_choice(own, end)
            if extension := self._whole_extension(own, end):
                choice["aerie"] = extension
            choices.append(choice)
            self._completion_tokens += end.completion_tokens
        body = {**self._head(self._kinds[0]), "choices": choices, "usage": self._usage()}
        if self.with_spans and self.choices == 1:
            body["aerie"] = _figures(finished[0])
        return body

    def part(self, progressed: Progressed) -> list[Json | str]:
        extension = self._part_extension(progressed)
        if not (progressed.text or progressed.tokens or extension):
            return []
        choice = self._part_choice(progressed)
        if extension:
            choice["aerie"] = extension
        return [self._chunk(choice)]

    def ended(self, finished: Finished) -> list[Json | str]:
        self._completion_tokens += finished.completion_tokens
        chunk = self._chunk(self._last_choice(finished))
        if self.with_spans:
            chunk["aerie"] = _figures(finished)
        return [chunk]

    def closing(self) -> list[Json | str]:
        """The usage, where it was asked for, in a chunk without choices."""
        if not self.with_usage:
            return ["[DONE]"]
        usage = {**self._head(self._kinds[1]), "choices": [], "usage": self._usage()}
        return [usage, "[DONE]"]

    def _whole_extension(self, rounds: Sequence[Progressed], finished: Finished) -> Json:
        extension: Json = {}
        if self.with_spans:
            extension["spans"] = [span for one in rounds for span in one.spans]
            if self.choices > 1:
                extension["figures"] = _figures(finished)
        if self.with_trees:
            extension["trees"] = [asdict(one.tree) for one in rounds if one.tree is not None]
        return extension

    def _part_extension(self, progressed: Progressed) -> Json:
        extension: Json = {}
        if self.with_spans:
            extension |= _known(
                spans=progressed.spans,
                tokens=progressed.num_tokens,
                tree_size=progressed.tree_size,
                seconds=_seconds(progressed.seconds),
            )
        if progressed.tree is not None:
            extension["tree"] = asdict(progressed.tree)
        return extension

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, choice: Json) -> Json:
        usage = {"usage": None} if self.with_usage else {}
        return {**self._head(self._kinds[1]), "choices": [choice], **usage}

    def _usage(self) -> Json:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self.prompt_tokens + self._completion_tokens,
        }


def _figures(finished: Finished) -> Json:
    return _known(
        accepted_length=_rounded(finished.accepted_length, 4),
        tokens_per_second=_rounded(finished.tokens_per_second, 2),
        rounds=finished.rounds,
        tree_size=_rounded(finished.tree_size, 2),
        seconds=_seconds(finished.seconds),
    )


def _known(**fields: Any) -> Json:
    """Without what the backend does not tell."""
    return {name: value for name, value in fields.items() if value is not None}


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _seconds(seconds: PhaseSeconds | None) -> Json | None:
    if seconds is None:
        return None
    return {name: round(value, 5) for name, value in asdict(seconds).items()}


def scored(tokens: Sequence[ScoredToken]) -> list[Json]:
    """Log-probabilities as chats have them."""
    return [
        {
            **_scored(token.text, token.logprob),
            "top_logprobs": [_scored(text, logprob) for text, logprob in token.top],
        }
        for token in tokens
    ]


def _scored(text: str, logprob: float) -> Json:
    return {
        "token": text,
        "logprob": logprob,
        "bytes": list(text.encode(errors="replace")),
    }


def server_sent(content: Json | str) -> str:
    """One event of a stream."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return f"data: {text}\n\n"


def model_list(names: Sequence[str], created: int) -> Json:
    """Body of `GET /v1/models`."""
    return {"object": "list", "data": [model_card(name, created) for name in names]}


def model_card(name: str, created: int) -> Json:
    """Body of `GET /v1/models/{name}`."""
    return {"id": name, "object": "model", "created": created, "owned_by": "aerie"}
