"""The formats in which conversations are written down: one reader function each.

A reader turns a record into a conversation, or raises with the reason. `FORMATS` holds them with
the test by which `auto` tells a record's format. To add one: a function, and a line there.

Calls of tools are the assistant's words, and learnt: `<tool_call>{"name": …}</tool_call>`, as
Hermes and Qwen write them. What a tool answers is a message of the role `tool`, never learnt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from core.data.conversations import Conversation, Kind, Message, RecordError, Role, shown

# Names under which data sets know the roles.
SPEAKERS: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}
CALL = "function_call"


@dataclass(frozen=True)
class Format:
    """How to tell a format (of JSON objects and strings), and how to read it."""

    fits: Callable[[Any], bool]
    read: Callable[[Any, str], Conversation]


def read_record(value: Any, source: str, format_name: str = "auto") -> tuple[str, Conversation]:
    """The name of a record's format, and its conversation.

    Args:
        value: parsed JSON.
        source: the file's name.
        format_name: one of FORMATS; `auto` takes the first that fits.
    Raises:
        RecordError: the record is no conversation, or none of that format.
    """
    if format_name != "auto":
        return format_name, FORMATS[format_name].read(value, source)
    for name, format_ in FORMATS.items():
        if format_.fits(value):
            return name, format_.read(value, source)
    raise RecordError(
        f"expected an object with 'conversations', 'messages', 'instruction', 'type', 'prompt' or "
        f"'text', or a prompt, got {shown(value)}"
    )


def read_sharegpt(value: Any, source: str) -> Conversation:
    """`{"id": …, "conversations": [{"from": "human", "value": …}, …], "system": …, "tools": …}`.

    Turns may also be spelt `role` and `content`. An empty list of turns is a conversation without
    turns: cleaning drops and counts it.

    Raises:
        RecordError: the value is no conversation at all.
    """
    turns = _list_of(value, "conversations")
    messages = [_sharegpt_turn(turn, number) for number, turn in enumerate(turns)]
    return _conversation(value, [*_preamble(value), *messages], source)


def read_pairs(value: Any, source: str) -> Conversation:
    """`{"conversation": [{"human": …, "assistant": …}, …], "category": …}`; categories go."""
    messages: list[Message] = []
    for number, pair in enumerate(_list_of(value, "conversation")):
        if not isinstance(pair, dict) or not {"human", "assistant"} & pair.keys():
            raise RecordError(f"turn {number}: expected 'human' and 'assistant', got {shown(pair)}")
        for name in ("system", "human", "assistant"):
            if pair.get(name) is not None:
                messages.append(Message(SPEAKERS[name], _text(pair[name], f"turn {number}")))
    return _conversation(value, [*_preamble(value), *messages], source)


def read_messages(value: Any, source: str) -> Conversation:
    """OpenAI's `{"messages": [{"role": …, "content": …, "tool_calls": …}, …], "tools": …}`.

    `content` is a text, a list of parts that are texts, or null beside tool calls.
    """
    turns = _list_of(value, "messages")
    messages = [_openai_turn(turn, number) for number, turn in enumerate(turns)]
    return _conversation(value, [*_preamble(value), *messages], source)


def read_alpaca(value: Any, source: str) -> Conversation:
    """`{"instruction": …, "input": …, "output": …, "system": …, "history": [[q, a], …]}`.

    Also `prompt` with `completion` or `response`, and `question` with `answer`.
    """
    _require_object(value)
    asked = _first(value, ALPACA_QUESTIONS)
    answered = _first(value, ALPACA_ANSWERS)
    if asked is None or answered is None:
        raise RecordError(f"expected 'instruction' and 'output', got {shown(value)}")
    messages = list(_preamble(value))
    for number, pair in enumerate(_some(value, "history", "history")):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RecordError(f"history {number}: expected [question, answer], got {shown(pair)}")
        messages += _exchange(pair[0], pair[1], f"history {number}")
    question = _text(value[asked], asked)
    more = value.get("input")
    if more is not None and asked != "input" and _text(more, "input").strip():
        question = f"{question}\n\n{more}"
    messages += _exchange(question, value[answered], answered)
    return _conversation(value, messages, source)


def read_prompt(value: Any, source: str) -> Conversation:
    """A question alone: a string, or `{"prompt": …}`."""
    text = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise RecordError(f"expected a text, or an object with 'prompt', got {shown(value)}")
    own = value if isinstance(value, dict) else {}
    return _conversation(own, [*_preamble(own), Message("user", text)], source, "prompt")


def read_text(value: Any, source: str) -> Conversation:
    """Running text, learnt whole: `{"text": …}`."""
    _require_object(value)
    return _conversation(
        value, [Message("assistant", _text(value.get("text"), "text"))], source, "text"
    )


def read_gdgpt(value: Any, source: str) -> Conversation:
    """gdGPT's records, told apart by `type`.

    `pretrain` (text), `instruct` (instruct, input or none, output), `conversation` (rounds),
    `conver_has_api` (rounds and api_desc), `ref_qa` (rounds and reference).
    """
    _require_object(value)
    kind = value.get("type")
    if kind == "pretrain":
        return read_text(value, source)
    if kind == "instruct":
        return read_alpaca(value, source)
    if kind not in GDGPT_TYPES:
        raise RecordError(f"type={shown(kind)} is none of {', '.join(GDGPT_TYPES)}")
    messages: list[Message] = []
    if kind == "conver_has_api":
        described = value.get("api_desc")
        if described:
            messages.append(_tools_message(_as_text(described)))
    for number, turn in enumerate(_list_of(value, "rounds")):
        messages += _gdgpt_round(turn, number)
    if kind == "ref_qa":
        messages = _with_reference(messages, _text(value.get("reference"), "reference"))
    return _conversation(value, messages, source)


ALPACA_QUESTIONS = ("instruction", "instruct", "question", "prompt")
ALPACA_ANSWERS = ("output", "completion", "response", "answer")
GDGPT_TYPES = ("pretrain", "instruct", "conversation", "conver_has_api", "ref_qa")


def _is_alpaca(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _first(value, ALPACA_QUESTIONS) is not None
        and _first(value, ALPACA_ANSWERS) is not None
    )


def _has(*names: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(value.get(n) is not None for n in names)


# In this order: a record with turns and a `text` beside them is a conversation.
FORMATS: dict[str, Format] = {
    "gdgpt": Format(lambda v: isinstance(v, dict) and v.get("type") in GDGPT_TYPES, read_gdgpt),
    "sharegpt": Format(_has("conversations"), read_sharegpt),
    "messages": Format(_has("messages"), read_messages),
    "pairs": Format(_has("conversation"), read_pairs),
    "alpaca": Format(_is_alpaca, read_alpaca),
    "prompt": Format(lambda v: isinstance(v, str) or _has("prompt")(v), read_prompt),
    "text": Format(_has("text"), read_text),
}


def _conversation(
    value: Mapping[str, Any], messages: Iterable[Message], source: str, kind: Kind = "chat"
) -> Conversation:
    own_id = value.get("id")
    # Half a surrogate pair is valid JSON and no valid text.
    name = "" if own_id is None else str(own_id).encode("utf-8", "replace").decode()
    return Conversation(name, tuple(messages), source, kind)


def _require_object(value: Any) -> None:
    if not isinstance(value, dict):
        raise RecordError(f"expected an object, got {shown(value)}")


def _list_of(value: Any, name: str) -> list[Any]:
    if not isinstance(value, dict):
        raise RecordError(f"expected an object with {name!r}, got {shown(value)}")
    turns = value.get(name)
    if not isinstance(turns, list):
        got = f"{shown(turns)} there" if name in value else shown(value)
        raise RecordError(f"expected a list under {name!r}, got {got}")
    return turns


def _some(value: Mapping[str, Any], name: str, where: str) -> list[Any]:
    """The list under `name`; an empty one where nothing is."""
    found = value.get(name)
    if found is None or isinstance(found, list):
        return found or []
    raise RecordError(f"{where}: expected a list under {name!r}, got {shown(found)}")


def _as_text(value: Any) -> str:
    """A text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _first(value: Mapping[str, Any], names: Iterable[str]) -> str | None:
    return next((name for name in names if value.get(name) is not None), None)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{where}: expected a text, got {shown(value)}")
    return value


def _exchange(question: Any, answer: Any, where: str) -> list[Message]:
    return [Message("user", _text(question, where)), Message("assistant", _text(answer, where))]


def _preamble(value: Mapping[str, Any]) -> list[Message]:
    """The system message that fields beside the turns amount to."""
    parts = []
    if isinstance(system := value.get("system"), str) and system.strip():
        parts.append(system)
    tools = value.get("tools") or value.get("functions")
    if tools and tools != "[]":
        parts.append(_tools_message(_as_text(tools)).content)
    return [Message("system", "\n\n".join(parts))] if parts else []


def _tools_message(described: str) -> Message:
    return Message("system", f"You can call these tools:\n<tools>\n{described.strip()}\n</tools>")


def _call(name: Any, arguments: Any) -> str:
    """A call as the assistant writes it; arguments that are JSON in a string become JSON."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            # Left as the text that it is: what the model is to write.
            pass
    content = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{content}\n</tool_call>"


def _sharegpt_turn(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict):
        raise RecordError(f"turn {number}: expected 'from' and a text 'value', got {shown(turn)}")
    if turn.get("from") is None and "role" in turn:
        return _openai_turn(turn, number)
    if not isinstance(turn.get("value"), str) or "from" not in turn:
        raise RecordError(f"turn {number}: expected 'from' and a text 'value', got {shown(turn)}")
    role, text = _role(turn["from"], "from", number), turn["value"]
    if turn["from"] == CALL:
        text = f"<tool_call>\n{text.strip()}\n</tool_call>"
    return Message(role, text)


def _role(speaker: Any, field: str, number: int) -> Role:
    role = SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise RecordError(
            f"turn {number}: {field}={shown(speaker)} is none of {', '.join(SPEAKERS)}"
        )
    return role


def _openai_turn(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict) or "role" not in turn:
        raise RecordError(f"turn {number}: expected 'role' and 'content', got {shown(turn)}")
    role = _role(turn["role"], "role", number)
    calls = _some(turn, "tool_calls", f"turn {number}")
    functions = [call.get("function") for call in calls if isinstance(call, dict)]
    if turn.get("function_call"):
        functions.append(turn["function_call"])
    written = []
    for function in functions:
        if not isinstance(function, dict) or "name" not in function:
            raise RecordError(f"turn {number}: expected a call's 'name', got {shown(function)}")
        written.append(_call(function["name"], function.get("arguments", {})))
    content = turn.get("content")
    if content is None and not written:
        raise RecordError(f"turn {number}: expected a text 'content', got {shown(turn)}")
    text = "" if content is None else _joined_parts(content, number)
    return Message(role, "\n".join([text] * bool(text) + written))


def _joined_parts(content: Any, number: int) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RecordError(f"turn {number}: expected a text 'content', got {shown(content)}")
    texts = []
    for part in content:
        if isinstance(part, dict):
            part = part.get("text") or part.get("refusal")
        if not isinstance(part, str):
            raise RecordError(f"turn {number}: a part of 'content' is no text ({shown(content)})")
        texts.append(part)
    return "\n".join(texts)


def _gdgpt_round(turn: Any, number: int) -> list[Message]:
    if not isinstance(turn, list | tuple) or len(turn) != 2:
        raise RecordError(f"round {number}: expected [speaker, text], got {shown(turn)}")
    speaker, said = turn
    if speaker == "ask":
        return [Message("user", _text(said, f"round {number}"))]
    if speaker == "ans":
        return [Message("assistant", _text(said, f"round {number}"))]
    if speaker != "ans-api" or not isinstance(said, dict):
        raise RecordError(f"round {number}: expected ask, ans or ans-api, got {shown(turn)}")
    messages: list[Message] = []
    for action in _some(said, "actions", f"round {number}"):
        if not isinstance(action, dict) or "api_name" not in action:
            raise RecordError(
                f"round {number}: expected an action's 'api_name', got {shown(action)}"
            )
        thought = str(action.get("inner_thought") or "").strip()
        call = _call(action["api_name"], action.get("api_param", {}))
        messages.append(Message("assistant", f"{thought}\n{call}" if thought else call))
        result = action.get("api_res")
        messages.append(Message("tool", "" if result is None else _as_text(result)))
    return [*messages, Message("assistant", _text(said.get("ans"), f"round {number}"))]


def _with_reference(messages: list[Message], reference: str) -> list[Message]:
    """In front of the first question, where any template can carry it."""
    for place, message in enumerate(messages):
        if message.role == "user":
            text = f"Answer according to this text.\n\n{reference.strip()}\n\n{message.content}"
            return [*messages[:place], Message("user", text), *messages[place + 1 :]]
    return messages
