"""Requests that are malformed in every way, for the service in this process and behind HTTP.

Which fields there are is taken from OpenAI's and TGI's descriptions and from Aerie's own models.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import jsonschema

from serve.completions import CompletionRequest
from serve.fields import Body
from serve.openai_chat import ChatRequest
from serve.tgi import GenerateRequest, Parameters
from serve.tokens import DetokenizeRequest, TokenizeRequest
from tests.descriptions import PARAMETERS, names_of
from tests.in_process import CHAT, HELLO, TEXT, TGI, Json

ADMIN = "/admin/draft"
BODIES: dict[str, Json] = {**HELLO, "/generate_stream": HELLO[TGI], ADMIN: {"path": "relative"}}
MODELS: dict[str, type[Body]] = {
    CHAT: ChatRequest,
    TEXT: CompletionRequest,
    TGI: GenerateRequest,
    "/generate_stream": GenerateRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}


class Odd(NamedTuple):
    """A body, and in what way it is odd."""

    kind: str
    body: bytes


# As JSON: some have no Python value.
VALUES: dict[str, tuple[str, ...]] = {
    "wrong type": (
        "null", "true", "false", "0", "-1", "1", "0.5", "-0.0", '""', '"🙂"', '"NaN"', '"1"',
        "[]", "{}", "[[]]", "[{}]", "[null]", "[true]", "[-1]", '[""]', '["a", 1]',
        '{"": {}}', '{"a": null}', '{"-1": 1}', '{"999999": 5}', '{"٣": 1}', '{"type": "text"}',
        '{"role": "user", "content": "x"}', '[{"role": "user"}]',
        '[{"role": "tool", "content": "x"}]', '[{"role": "user", "content": null}]',
        '[{"role": "user", "content": [{"type": "text"}]}]',
        '[{"role": "assistant", "content": ""}]',
    ),
    "huge number": (
        "1e400", "-1e400", "NaN", "Infinity", "9223372036854775807", "-9223372036854775809",
        "1" + "0" * 400, "1e-320", "[1e400]", "[" + "1," * 3_000 + "1]", '"' + "x" * 20_000 + '"',
    ),
    "bad Unicode": ('"\\u0000"', '"\\ud800"', '"\\udfff\\ud800"', '["\\ud800"]'),
    "deep JSON": ("[" * 500 + "]" * 500, '{"a":' * 300 + "1" + "}" * 300),
    # Allowed somewhere, and the last that are.
    "extreme": ("0.00001", "0.001", "1000", "2", "-2", '{"40": 100}', '{"40": -100}', "[40]", "16"),
}  # fmt: skip


def odd_fields(path: str, **more: object) -> Iterator[Odd]:
    """A good body in which one field has an odd value: every field, and every value."""
    for name in {**MODELS[path].model_fields, **dict.fromkeys(names_of(path))}:
        yield from odd_values({**BODIES[path], **more}, name)


def odd_parameters() -> Iterator[Odd]:
    """The same of TGI's parameters."""
    for name in {**Parameters.model_fields, **dict.fromkeys(names_of(PARAMETERS))}:
        for kind, inner in odd_values({"max_new_tokens": 2, "do_sample": True}, name):
            yield Odd(kind, b'{"inputs": "Hi", "parameters": ' + inner + b"}")


def odd_values(body: Json, name: str) -> Iterator[Odd]:
    """A body in which a field has each of the values in turn."""
    for kind, values in VALUES.items():
        for value in values:
            changed = json.dumps({**body, name: "VALUE"}).replace('"VALUE"', value)
            yield Odd(kind, changed.encode())


def odd_bodies(path: str, *, random_ones: int = 40, damaged_ones: int = 120) -> Iterator[Odd]:
    """No JSON, no text, too much, and good ones with damage."""
    good = json.dumps(BODIES[path]).encode()
    draw = random.Random(path)
    for body in (
        b"", b"{", b"[]", b"null", b"{}{}", good + b"}", good[:-1],
        b'{"model": "tiny", "model": 1}',
    ):  # fmt: skip
        yield Odd("no JSON", body)
    for body in (b"\xff\xfe{}", b"\x00", good.decode().encode("utf-16"), good + b"\xff"):
        yield Odd("bad UTF-8", body)
    for body in (b"[" * 50_000, b'{"a":' * 20_000):
        yield Odd("deep JSON", body)
    yield Odd("huge number", b"9" * 50_000)
    yield Odd("too long", b"x" * 100_001)
    for _ in range(random_ones):
        yield Odd("random bytes", draw.randbytes(draw.randrange(200)))
    for _ in range(damaged_ones):
        yield Odd("damaged", damaged(good, draw))


def more_damage() -> Iterator[tuple[str, Odd]]:
    """Path and body, without end: half of them random, half of them nearly good."""
    draw = random.Random(0)
    goods = {path: json.dumps(body).encode() for path, body in BODIES.items()}
    for number in count():
        path = draw.choice(list(goods))
        if number % 2:
            yield path, Odd("random bytes", draw.randbytes(draw.randrange(200)))
        else:
            yield path, Odd("damaged", damaged(goods[path], draw))


class Description:
    """A server's own /openapi.json, as judge of what is malformed."""

    def __init__(self, openapi: Json) -> None:
        self._fitting = {
            path: jsonschema.Draft202012Validator(
                {
                    **operations["post"]["requestBody"]["content"]["application/json"]["schema"],
                    "components": openapi["components"],
                }
            )
            for path, operations in openapi["paths"].items()
            if "requestBody" in operations.get("post", {})
        }

    def is_malformed(self, path: str, body: bytes) -> bool:
        """Whether a body is no JSON, or none that the description allows."""
        try:
            value = json.loads(body.decode(), parse_constant=_no_number)
            json.dumps(value, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            return True
        return not self._fitting[path].is_valid(value)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


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
