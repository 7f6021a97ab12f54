"""OpenAI's and TGI's public descriptions of their interfaces, as their clients carry them.

The types of `openai` are generated from OpenAI's OpenAPI description, those of `huggingface_hub`
from TGI's. So what a field is called and may hold stands in there, and nothing here is our word.
"""

from __future__ import annotations

import collections.abc
import json
from functools import cache
from typing import Any, TypeVar, get_args, get_origin

from huggingface_hub import (
    TextGenerationInput,
    TextGenerationInputGenerateParameters,
    TextGenerationOutput,
    TextGenerationStreamOutput,
)
from openai.types import Completion
from openai.types import completion_create_params as completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessageParam
from openai.types.chat import completion_create_params as chat
from pydantic import BaseModel, TypeAdapter, ValidationError
from typing_extensions import get_type_hints

from tests.in_process import CHAT, TEXT, TGI, Json

Shape = TypeVar("Shape", bound=BaseModel)
PARAMETERS = "parameters"
OPENAI: dict[str, tuple[Any, ...]] = {
    CHAT: (chat.CompletionCreateParamsNonStreaming, chat.CompletionCreateParamsStreaming),
    TEXT: (
        completion.CompletionCreateParamsNonStreaming,
        completion.CompletionCreateParamsStreaming,
    ),
}


@cache
def request_fields(path: str) -> dict[str, Any]:
    """Type of each field of a request; the streaming form and the other have the same ones."""
    if path in OPENAI:
        return {name: hint for form in OPENAI[path] for name, hint in get_type_hints(form).items()}
    wanted = TextGenerationInputGenerateParameters if path == PARAMETERS else TextGenerationInput
    return get_type_hints(wanted)


@cache
def message_fields() -> dict[tuple[str, str], Any]:
    """Type of each field of a message, by role and name."""
    return {
        (role, name): hint
        for kind in get_args(ChatCompletionMessageParam)
        for role in get_args(get_type_hints(kind)["role"])
        for name, hint in get_type_hints(kind).items()
    }


def names_of(path: str) -> tuple[str, ...]:
    """The fields that the description of a path has; none where there is no such description."""
    described = {**dict.fromkeys(OPENAI), TGI: 0, "/generate_stream": 0, PARAMETERS: 0}
    return tuple(request_fields(path)) if path in described else ()


def allows(hint: Any, value: Any) -> bool:
    """Whether a value is of a field's type; a number with a fraction is no integer, and so on."""
    try:
        _adapter(hint).validate_json(json.dumps(value), strict=True)
    except ValidationError:
        return False
    return True


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(_as_json(hint))


def _as_json(hint: Any) -> Any:
    """Iterables and sequences are lists in JSON; as iterables, pydantic would not look inside."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (collections.abc.Iterable, collections.abc.Sequence):
        return list[_as_json(inner[0])]  # type: ignore[misc]
    if inner and origin is not None and str(origin) != "typing.Literal":
        try:
            return hint.copy_with(tuple(map(_as_json, inner)))
        except AttributeError:
            return hint
    return hint


def parsed(shape: type[Shape], body: Json) -> Shape:
    """A body as the client reads it, but strictly: no type converted, no field that it lacks.

    Aerie's own extension is the one exception.
    """
    answer = shape.model_validate_json(json.dumps(body), strict=True)
    for place, extra in _extras(answer, shape.__name__):
        assert set(extra) <= {"aerie"}, f"{place} has {sorted(extra)}, which OpenAI's has not"
    return answer


def parsed_answer(path: str, body: Json, *, chunk: bool = False) -> None:
    """Hold an answer, or an event of a stream, against the description of its path.

    Raises:
        pydantic.ValidationError: it is not of that shape.
    """
    if path == CHAT:
        parsed(ChatCompletionChunk if chunk else ChatCompletion, body)
    elif path == TEXT:
        # The type says that there always is a reason; before the last chunk there is none.
        choices = [
            {**choice, "finish_reason": choice["finish_reason"] or "stop"} if chunk else choice
            for choice in body["choices"]
        ]
        parsed(Completion, {**body, "choices": choices})
    else:
        adapter: TypeAdapter[Any] = TypeAdapter(
            TextGenerationStreamOutput if chunk else TextGenerationOutput
        )
        answer = adapter.validate_json(json.dumps(body), strict=True)
        read = json.loads(adapter.dump_json(answer))
        assert _without_nulls(read) == _without_nulls(body), "it has fields that TGI's has not"


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return list(map(_without_nulls, value)) if isinstance(value, list) else value


def _extras(value: Any, place: str) -> collections.abc.Iterator[tuple[str, Json]]:
    if isinstance(value, BaseModel):
        yield place, value.model_extra or {}
        for name in type(value).model_fields:
            yield from _extras(getattr(value, name), f"{place}.{name}")
    elif isinstance(value, list):
        for one in value:
            yield from _extras(one, f"{place}[]")
