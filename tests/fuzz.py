"""Requests that are malformed in every way, for the service in this process and behind HTTP."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

from serve.completions import CompletionRequest
from serve.fields import Body
from serve.openai_chat import ChatRequest
from serve.tgi import GenerateRequest, Parameters
from serve.tokens import DetokenizeRequest, TokenizeRequest
from tests.in_process import CHAT, HELLO, TEXT, TGI, Json

ADMIN = "/admin/draft"
BODIES: dict[str, Json] = {**HELLO, "/generate_stream": HELLO[TGI], ADMIN: {"path": "relative"}}
FIELDS: dict[str, type[Body]] = {
    CHAT: ChatRequest,
    TEXT: CompletionRequest,
    TGI: GenerateRequest,
    "/generate_stream": GenerateRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
# As JSON: some have no Python value.
NASTY = (
    "null", "true", "false", "0", "-1", "1", "0.5", "-0.0", "1e400", "-1e400", "NaN", "Infinity",
    "9223372036854775807", "-9223372036854775809", "1" + "0" * 400, "1e-320", '""', '"\\u0000"',
    '"\\ud800"', '"\\udfff\\ud800"', '"🙂"', '"NaN"', '"1"', "[]", "{}", "[[]]", "[{}]", "[null]",
    "[true]", "[-1]", "[1e400]", '[""]', '["\\ud800"]', '["a", 1]', "[" + "1," * 3_000 + "1]",
    '{"": {}}', '{"a": null}', '{"-1": 1}', '{"999999": 5}', '{"٣": 1}', '{"type": "text"}',
    '{"role": "user", "content": "x"}', '[{"role": "user"}]', '[{"role": "tool", "content": "x"}]',
    '[{"role": "user", "content": null}]', '[{"role": "user", "content": [{"type": "text"}]}]',
    '[{"role": "assistant", "content": ""}]', "[" * 500 + "]" * 500, '"' + "x" * 20_000 + '"',
)  # fmt: skip

# Allowed somewhere, and the last that are.
EXTREME = ("0.00001", "0.001", "1000", "2", "-2", '{"40": 100}', '{"40": -100}', "[40]", "16")


def odd_fields(path: str, **more: object) -> Iterator[bytes]:
    """A good body in which one field has an odd value: every field, and every value."""
    for name in FIELDS[path].model_fields:
        yield from odd_values({**BODIES[path], **more}, name)


def odd_parameters() -> Iterator[bytes]:
    """The same of TGI's parameters."""
    for name in Parameters.model_fields:
        for inner in odd_values({"max_new_tokens": 2, "do_sample": True}, name):
            yield b'{"inputs": "Hi", "parameters": ' + inner + b"}"


def odd_values(body: Json, name: str) -> Iterator[bytes]:
    """A body in which a field has each of the values in turn."""
    for value in (*NASTY, *EXTREME):
        yield json.dumps({**body, name: "VALUE"}).replace('"VALUE"', value).encode()


def odd_bodies(path: str, *, random_ones: int = 40, damaged_ones: int = 120) -> Iterator[bytes]:
    """No JSON, no text, too much, and good ones with damage."""
    good = json.dumps(BODIES[path]).encode()
    draw = random.Random(path)
    yield from (
        b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"\x00", b"{}{}", b"[" * 50_000,
        b'{"a":' * 20_000, b"9" * 50_000, good + b"}", good[:-1], good.decode().encode("utf-16"),
        b'{"model": "tiny", "model": 1}', b"x" * 100_001,
    )  # fmt: skip
    yield from (draw.randbytes(draw.randrange(200)) for _ in range(random_ones))
    yield from (damaged(good, draw) for _ in range(damaged_ones))


def damaged(body: bytes, draw: random.Random) -> bytes:
    """Some bytes changed, dropped or doubled."""
    changed = bytearray(body)
    for _ in range(draw.randrange(1, 4)):
        place = draw.randrange(len(changed))
        kind = draw.randrange(3)
        if kind == 0:
            changed[place] = draw.randrange(256)
        elif kind == 1:
            del changed[place]
        else:
            changed[place:place] = changed[place : place + draw.randrange(1, 9)]
    return bytes(changed)
