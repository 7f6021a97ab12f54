"""What /openapi.json says of the answers: the shapes of all bodies, and of every refusal.

Answers are built as plain JSON (`serve/answers.py`); these types describe them and are nowhere
filled at run time. That they agree is for the tests to show, which hold answers against them.
"""

# No `from __future__ import annotations`: FastAPI reads the types of the routes at run time.

from typing import Any, Literal, NotRequired, Required

from fastapi import FastAPI
from pydantic import ConfigDict

# The standard library's does not carry pydantic's settings before Python 3.12.
from typing_extensions import TypedDict

KNOWN = ConfigDict(extra="forbid")


class ErrorDetail(TypedDict):
    """OpenAI's error: `param` is the field of the request that is to blame."""

    __pydantic_config__ = KNOWN  # type: ignore[misc]
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error", "timeout_error"]
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """The body of every answer that is no 2xx."""

    __pydantic_config__ = KNOWN  # type: ignore[misc]
    error: ErrorDetail


class ModelHealth(TypedDict):
    """Whether anyone could answer for a model; `idle` starts a replica when asked."""

    __pydantic_config__ = KNOWN  # type: ignore[misc]
    status: Literal["ok", "idle", "starting"]
    replicas: int


class Health(TypedDict):
    """The same of all models together, and of each; `draining` takes no new requests."""

    __pydantic_config__ = KNOWN  # type: ignore[misc]
    status: Literal["ok", "idle", "starting", "draining"]
    replicas: int
    models: dict[str, ModelHealth]


class Live(TypedDict):
    """That the server's process answers."""

    __pydantic_config__ = KNOWN  # type: ignore[misc]
    status: Literal["ok"]


class ModelCard(TypedDict):
    """OpenAI's description of a model."""

    __pydantic_config__ = KNOWN  # type: ignore[misc]
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(TypedDict):
    """All models that are served."""

    __pydantic_config__ = KNOWN  # type: ignore[misc]
    object: Literal["list"]
    data: list[ModelCard]


class Usage(TypedDict):
    """Tokens of a request."""

    __pydantic_config__ = KNOWN  # type: ignore[misc]
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Seconds(TypedDict):
    """Where the time went."""

    __pydantic_config__ = KNOWN  # type: ignore[misc]
    prefill: float
    draft: float
    verify: float


class Figures(TypedDict, total=False):
    """Aerie's extension: how speculation went, as far as the backend tells."""

    __pydantic_config__ = KNOWN  # type: ignore[misc]
    accepted_length: float
    tokens_per_second: float
    rounds: int
    tree_size: float
    seconds: Seconds


class Tree(TypedDict):
    """A round's draft tree; see `ShownTree`."""

    __pydantic_config__ = KNOWN  # type: ignore[misc]
    parents: list[int]
    texts: list[str]
    accepted: list[int]
    bonus: str | None


class Spans(TypedDict):
    """Aerie's extension: texts and whether each had been guessed, and the trees.

    Each is there where it was asked for; what a backend does not tell is null.
    """

    __pydantic_config__ = KNOWN  # type: ignore[misc]
    spans: NotRequired[list[tuple[str, bool | None]]]
    figures: NotRequired[Figures]
    trees: NotRequired[list[Tree]]


class Scored(TypedDict):
    """A token and its log-probability."""

    __pydantic_config__ = KNOWN  # type: ignore[misc]
    token: str
    logprob: float
    bytes: list[int]


class ScoredChoice(Scored):
    """The token that was taken, and the likeliest in its place."""

    __pydantic_config__ = KNOWN  # type: ignore[misc]
    top_logprobs: list[Scored]


class ChatLogprobs(TypedDict):
    """Of each token of a message."""

    __pydantic_config__ = KNOWN  # type: ignore[misc]
    content: list[ScoredChoice]
    refusal: None


class Message(TypedDict):
    """What is answered."""

    __pydantic_config__ = KNOWN  # type: ignore[misc]
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    """One answer to a conversation."""

    __pydantic_config__ = KNOWN  # type: ignore[misc]
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    aerie: NotRequired[Spans]


class _Whole(TypedDict, total=False):
    id: Required[str]
    created: Required[int]
    model: Required[str]
    usage: Required[Usage]
    aerie: Figures


class Chat(_Whole):
    """OpenAI's chat completion."""

    __pydantic_config__ = KNOWN  # type: ignore[misc]
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    service_tier: NotRequired[Literal["default"]]


class TextLogprobs(TypedDict):
    """Of each token of a text."""

    __pydantic_config__ = KNOWN  # type: ignore[misc]
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(TypedDict):
    """One way in which a text goes on."""

    __pydantic_config__ = KNOWN  # type: ignore[misc]
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]
    aerie: NotRequired[Spans]


class Completion(_Whole):
    """OpenAI's completion."""

    __pydantic_config__ = KNOWN  # type: ignore[misc]
    object: Literal["text_completion"]
    choices: list[TextChoice]


class TgiToken(TypedDict):
    """A token."""

    __pydantic_config__ = KNOWN  # type: ignore[misc]
    id: int
    text: str
    logprob: float
    special: bool


class TgiDetails(TypedDict):
    """What `details: true` adds."""

    __pydantic_config__ = KNOWN  # type: ignore[misc]
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    seed: int | None
    prefill: list[TgiToken]
    tokens: list[TgiToken]


class Generated(TypedDict):
    """TGI's answer."""

    __pydantic_config__ = KNOWN  # type: ignore[misc]
    generated_text: str
    details: NotRequired[TgiDetails]


class Tokenized(TypedDict):
    """The tokens of a text, and how many the model takes."""

    __pydantic_config__ = KNOWN  # type: ignore[misc]
    count: int
    max_model_len: int
    tokens: list[int]


class Detokenized(TypedDict):
    """The text of tokens."""

    __pydantic_config__ = KNOWN  # type: ignore[misc]
    prompt: str


# What a client, or a proxy in front of it, has to know of each refusal.
REFUSALS = {
    400: "A field is wrong, unknown or not supported; or the request does not fit the model.",
    401: "No valid API key.",
    403: "This server has no keys for /admin.",
    404: "No such model.",
    408: "The body did not come in time.",
    409: "Another draft head is on trial.",
    413: "The body is too long.",
    429: "Too many requests wait, or came from this client.",
    500: "An error of the server's own.",
    503: "No replica could answer, or the server is being stopped.",
    504: "The answer took too long.",
}
_RETRY_AFTER = {
    "Retry-After": {"description": "seconds", "required": True, "schema": {"type": "integer"}}
}
_EVENT = {
    "type": "object",
    "properties": {
        "data": {
            "type": "string",
            "description": "JSON; the last one of OpenAI's streams is [DONE]",
        }
    },
    "required": ["data"],
}
# What any request may meet before it comes to a route.
GUARDED = (401, 408, 413, 429, 500, 503)
GENERATING = (*GUARDED, 400, 404, 504)

Responses = dict[int | str, dict[str, Any]]


def answers(shape: Any, *refusals: int, stream: bool = False) -> Responses:
    """For a route's `responses`: what it answers, as one body, a stream of events or both.

    Args:
        shape: type of the body; None where it is a stream alone, or described otherwise.
        refusals: statuses, of REFUSALS.
        stream: whether it may be server-sent events.
    """
    good: dict[str, Any] = {} if shape is None else {"model": shape}
    if stream:
        good["content"] = {"text/event-stream": {"itemSchema": _EVENT}}
    described: Responses = {200: {"description": "The answer.", **good}} if good else {}
    for status in sorted(refusals):
        described[status] = {"model": ErrorBody, "description": REFUSALS[status]}
        if status == 429:
            described[status]["headers"] = _RETRY_AFTER
    return described


class DescribedAPI(FastAPI):
    """FastAPI describes a 422 for every body, in its own shape; here a wrong body is a 400."""

    def openapi(self) -> dict[str, Any]:
        """The description, as /openapi.json has it."""
        if self.openapi_schema is None:
            described = super().openapi()
            for operations in described["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                described["components"]["schemas"].pop(name, None)
        assert self.openapi_schema is not None
        return self.openapi_schema
