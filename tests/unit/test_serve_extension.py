"""Aerie's extension of OpenAI's protocol, in front of a real replica that speculates.

It copies what followed before. Answers are of three letters, so that many guesses are right
without a draft head.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tests.in_process import CHAT, HELLO, TEXT, Json, Service, in_process

NUM_TOKENS = 60
ASKED: Json = {"max_tokens": NUM_TOKENS, "logit_bias": {"40": 100, "41": 100, "42": 100}}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("extension")
    with in_process(folder, ngram_match=1, total_tokens=8) as service:
        yield service


def text_of(choice: Json) -> str:
    return choice["message"]["content"] if "message" in choice else choice["text"]


def parts_of(chunks: list[Json]) -> list[Json]:
    """The extension of each chunk that has one."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return [choice["aerie"] for choice in choices if "aerie" in choice]


def check_tree(part: Json) -> None:
    """What a round's tree says is what the round gave."""
    tree = part["tree"]
    assert len(tree["texts"]) == len(tree["parents"]) == part["tree_size"]
    assert all(-1 < parent < node for node, parent in enumerate(tree["parents"]) if node)
    path = tree["accepted"]
    assert [tree["parents"][node] for node in path] == [-1, *path[:-1]]
    texts = [tree["texts"][node] for node in path[1:]]
    texts += [] if tree["bonus"] is None else [tree["bonus"]]
    assert len(texts) == part["tokens"]
    spans = "".join(text for text, _ in part["spans"])
    assert "".join(texts) == spans


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_the_tree_of_each_round_where_it_is_asked_for(service: Service, path: str) -> None:
    parts = parts_of(service.stream(path, **ASKED, aerie={"spans": True, "tree": True}))
    rounds = [part for part in parts if part["tree_size"]]
    assert [part for part in parts if "tree" in part] == rounds and len(rounds) > 3
    for part in rounds:
        check_tree(part)
    assert max(len(part["tree"]["accepted"]) for part in rounds) > 2, "nothing was guessed"
    assert any(part["tree_size"] > len(part["tree"]["accepted"]) for part in rounds)
    choice = service.answer(path, **ASKED, aerie={"tree": True})["choices"][0]
    assert choice["aerie"] == {"trees": [part["tree"] for part in rounds]}
    for fields in ({}, {"aerie": {"spans": True}}, {"aerie": {"speculate": False}}):
        assert '"tree"' not in service.call(path, **ASKED, **fields, stream=True).text
        assert '"trees"' not in service.call(path, **ASKED, **fields).text


def test_a_tree_ends_with_the_answer(service: Service) -> None:
    """What was accepted behind the last token is nobody's."""
    (cut,) = [
        limit
        for limit in range(NUM_TOKENS, 1, -1)
        if last_tree(service, max_tokens=limit)["bonus"] is None
    ][:1]
    for stops in ({"max_tokens": cut}, {"stop": text_of(whole(service, max_tokens=cut))[-3:]}):
        parts = parts_of(service.stream(CHAT, **{**ASKED, **stops}, aerie={"tree": True}))
        counted = parts_of(service.stream(CHAT, **{**ASKED, **stops}, aerie={"spans": True}))
        told = sum(
            len(part["tree"]["accepted"]) - (part["tree"]["bonus"] is None) for part in parts
        )
        assert 1 + told == sum(part["tokens"] for part in counted)


def whole(service: Service, **fields: Any) -> Json:
    return service.answer(CHAT, **{**ASKED, **fields}, aerie={"tree": True})["choices"][0]


def last_tree(service: Service, **fields: Any) -> Json:
    return whole(service, **fields)["aerie"]["trees"][-1]


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("fields", [{}, {"temperature": 0.3, "seed": 2}])
def test_the_target_alone_says_the_same_a_token_a_round(
    service: Service, path: str, fields: Json
) -> None:
    asked = {**ASKED, **fields}
    guessed = service.answer(path, **asked, aerie={"spans": True})
    tally = service.replica.heads.current.tally
    plain = service.answer(path, **asked, aerie={"spans": True, "speculate": False})
    assert service.replica.heads.current.tally == tally, "no merit or fault of the head's"
    assert text_of(plain["choices"][0]) == text_of(guessed["choices"][0])
    assert guessed["aerie"]["accepted_length"] > 1.1 and guessed["aerie"]["tree_size"] > 1
    figures = plain["aerie"]
    assert (figures["accepted_length"], figures["tree_size"]) == (1, 1)
    assert figures["rounds"] == NUM_TOKENS - 1
    assert not any(drafted for _, drafted in plain["choices"][0]["aerie"]["spans"])


def test_both_ways_go_in_one_batch(service: Service) -> None:
    async def together() -> list[Json]:
        ways = [{"spans": True, "speculate": number % 2 == 0} for number in range(6)]
        bodies = [{**HELLO[CHAT], **ASKED, "aerie": way} for way in ways]
        calls = [service.client.post(CHAT, json=body) for body in bodies]
        return [response.json() for response in await asyncio.gather(*calls)]

    answers = service.run(together())
    assert len({text_of(one["choices"][0]) for one in answers}) == 1
    lengths = [one["aerie"]["accepted_length"] for one in answers]
    assert set(lengths[1::2]) == {1} and min(lengths[::2]) > 1
