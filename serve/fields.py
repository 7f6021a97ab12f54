"""Fields that OpenAI's requests have in common, and how a field that is not served is refused.

Differences from OpenAI's service, all documented in the README:

* Sampling settings default to the server's `decode` section (greedy as it comes), so that answers
  are those of the evaluation unless a client asks otherwise.
* A field that would change the output and is not supported is an error, never ignored. One that
  changes nothing (`user`, `metadata`, …, or `tools: []`) is accepted, if its type is right.
* null is the same as leaving a field out.
* `top_k`, `min_p`, `repetition_penalty` and `stop_token_ids` are vLLM's.
* `aerie: {"spans": true}` adds `choices[…].aerie` with the text of each token and whether it had
  been guessed, and `aerie` with the figures of the whole answer. `"tree": true` adds each round's
  draft tree to it, and `"speculate": false` has the target decode alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError

from serve.errors import FIELD_PROBLEM
from serve.generation import Generation, Prompt

MOST_CHOICES = 16
MOST_STOPS = 16
MOST_TOP_LOGPROBS = 20
# Of a body's unknown fields, so many are told of.
MOST_UNKNOWN = 5
# What a JSON schema says of a field besides what it may hold.
ABOUT = ("title", "default", "description")


def _encodable(text: str) -> str:
    """JSON can escape half a surrogate pair, which is no character and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"not valid Unicode at position {error.start}") from error
    return text


Unicode = Annotated[str, AfterValidator(_encodable)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Item = TypeVar("Item")
# Only the first wrong item is told of: a body may have hundreds of thousands, and to note all of
# them would hold everybody else up for seconds.
ListOf = Annotated[list[Item], Field(fail_fast=True)]
DictOf = Annotated[dict[str, Item], Field(fail_fast=True)]


class Body(BaseModel):
    """A JSON object of which every field is known.

    Attributes:
        NEUTRAL: fields that are not supported, but harmless with these values.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    NEUTRAL: ClassVar[Mapping[str, Sequence[Any]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _sort_out_unsupported(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kept, unknown = {}, 0
        for name, given in value.items():
            if name in cls.model_fields:
                if given is not None:
                    kept[name] = given
            elif name in cls.NEUTRAL:
                if given is not None and not _is_one_of(given, cls.NEUTRAL[name]):
                    message = f"{name} is {_only_as(cls.NEUTRAL[name])}; leave it out"
                    raise field_problem(name, message, code="unsupported_parameter")
            elif unknown < MOST_UNKNOWN:
                unknown += 1
                kept[name] = given  # refused as unknown
        return kept

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """What the description of the interface says of it: nulls and neutral values too."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        fields = schema["properties"]
        for name in fields.keys() - schema.get("required", ()):
            given = fields[name]
            if {"type": "null"} not in given.get("anyOf", ()):
                about = {key: given.pop(key) for key in ABOUT if key in given}
                fields[name] = {"anyOf": [given, {"type": "null"}], **about}
        for name, neutral in cls.NEUTRAL.items():
            fields[name] = {"enum": [*neutral, None], "description": _only_as(neutral)}
        return schema


def field_problem(name: str, message: str, *, code: str | None = None) -> PydanticCustomError:
    """What a validator of a whole body raises where one of its fields is to blame."""
    return PydanticCustomError(
        FIELD_PROBLEM, "{message}", {"field": name, "message": message, "code": code}
    )


def _is_one_of(given: Any, allowed: Sequence[Any]) -> bool:
    # To Python, True is 1.
    return any(type(given) is type(one) and given == one for one in allowed)


def _only_as(neutral: Sequence[Any]) -> str:
    only = " or ".join(json.dumps(allowed) for allowed in neutral)
    return f"supported here only as {only}" if neutral else "not supported here"


def given_of(**settings: Any) -> dict[str, Any]:
    """The decoder's settings that a request gives."""
    return {name: value for name, value in settings.items() if value is not None}


class StreamOptions(Body):
    """How a stream is sent."""

    include_usage: bool = False
    include_obfuscation: bool = False


class AerieOptions(Body):
    """Aerie's extension.

    Attributes:
        spans: tell which tokens had been guessed, and the figures of rounds and answer.
        tree: tell each round's draft tree.
        speculate: false has the target decode alone, with the same text.
    """

    spans: bool = False
    tree: bool = False
    speculate: bool = True


class SampledBody(Body):
    """Sampling, stopping and streaming, as chats and completions have them."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="-1 and 0 are all tokens")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=1e-3, le=1e3)
    logit_bias: DictOf[Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Unicode | ListOf[Annotated[Unicode, Field(min_length=1)]] | None = None
    stop_token_ids: ListOf[TokenId] | None = Field(None, max_length=1024)
    aerie: AerieOptions | None = None
    user: Unicode | None = Field(None, description="changes nothing")

    @field_validator("stop")
    @classmethod
    def _some_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        if value == "" or (isinstance(value, list) and len(value) > MOST_STOPS):
            raise ValueError(f"give up to {MOST_STOPS} strings that are not empty")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for token in value or {}:
            if not (token.isascii() and token.isdigit() and len(token) < 10):
                raise ValueError('give token ids, as in {"123": -100}')
        return value

    @model_validator(mode="after")
    def _options_belong_together(self) -> SampledBody:
        if self.stream_options is not None and not self.stream:
            message = "stream_options is given without stream: true; drop it or stream"
            raise field_problem("stream_options", message)
        return self

    @property
    def with_spans(self) -> bool:
        return self.aerie is not None and self.aerie.spans

    @property
    def with_trees(self) -> bool:
        return self.aerie is not None and self.aerie.tree

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def asked(
        self,
        prompts: Sequence[Prompt],
        field: str,
        max_new_tokens: int | None,
        logprobs: int | None,
        *,
        echo: bool = False,
    ) -> Generation:
        """What the decoder is asked, with the prompts that a field holds."""
        bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        return Generation(
            tuple(prompts),
            prompt_field=field,
            choices=self.n,
            max_new_tokens=max_new_tokens,
            sampling=given_of(
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=None if self.top_k is None else max(self.top_k, 0),
                min_p=self.min_p,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                repetition_penalty=self.repetition_penalty,
                logit_bias=bias or None,
                logprobs=logprobs,
            ),
            seed=self.seed,
            stops=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            echo=echo,
            speculate=self.aerie is None or self.aerie.speculate,
            trees=self.with_trees,
        )
