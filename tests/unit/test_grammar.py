"""core.decode.grammar: answers follow a schema, and speculation does not show in them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from core.config import DecodeConfig
from core.decode.engine import SpeculativeDecoder
from core.decode.grammar import MOST_CHARACTERS, MOST_PARTS, MOST_SCHEMAS, JsonGrammars
from core.decode.requests import Request
from core.decode.sampling import SamplingSettings
from core.decode.tree import DraftTree
from core.errors import InputError
from core.models.target import Target

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bc"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
ONE_NUMBER = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip


@pytest.fixture(scope="module")
def grammars(tiny_target: Target) -> JsonGrammars:
    return JsonGrammars(tiny_target.tokenizer, tiny_target.vocab_size, tiny_target.eos_token_ids)


def allowed(target: Target, row_V: torch.Tensor) -> set[str]:
    ids = torch.nonzero(row_V > -math.inf)[:, 0].tolist()
    return {target.tokenizer.decode([one]) for one in ids}


def chain(length: int) -> str:
    """A schema in which each definition has the next one inside."""
    inner = {
        f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}}
        for i in range(length)
    }
    return json.dumps({"$defs": {**inner, f"d{length}": {"type": "string"}}, "$ref": "#/$defs/d0"})


def test_references_as_deep_as_they_may_be_do_not_end_the_process(grammars: JsonGrammars) -> None:
    deepest = chain(MOST_PARTS // 3 - 1)
    assert deepest.count("{") == MOST_PARTS - 1
    grammars.constraint(deepest)._allowed()
    with pytest.raises(InputError, match=r"has 30003 objects and lists; give one of 10000"):
        grammars.constraint(chain(10_000))


def test_a_schema_that_would_hold_everybody_up_is_refused(grammars: JsonGrammars) -> None:
    with pytest.raises(InputError, match=r"has 300013 characters; give one of 300000 at most"):
        grammars.constraint(json.dumps({"const": "x" * MOST_CHARACTERS}))


def test_each_node_of_a_tree_has_what_may_follow_its_path(
    tiny_target: Target, grammars: JsonGrammars
) -> None:
    constraint = grammars.constraint(json.dumps(ONE_NUMBER))
    brace, quote, space, other = (tiny_target.tokenizer(one)["input_ids"][0] for one in '{" x')
    ids = torch.tensor([other, brace, other, quote, space])
    tree = DraftTree(ids, (-1, 0, 0, 1, 1), (0, 1, 2, 3, 4))
    logits_NV = torch.zeros(5, tiny_target.vocab_size)
    masked_NV = constraint.apply(tree, logits_NV)
    assert allowed(tiny_target, masked_NV[0]) == {"{"}
    assert allowed(tiny_target, masked_NV[1]) == {'"', " ", "\n"}
    assert allowed(tiny_target, masked_NV[3]) == {"a"}
    assert allowed(tiny_target, masked_NV[4]) == {'"', " ", "\n"}
    assert not torch.isinf(masked_NV[2]).any(), "nobody gets there"
    assert not torch.isinf(logits_NV).any(), "what was given stays"
    # Looking ahead has moved nothing.
    assert torch.equal(constraint.apply(tree, logits_NV), masked_NV)
    constraint.append(tiny_target.tokenizer('{"a": 12}')["input_ids"])
    (end,) = tiny_target.eos_token_ids
    root = DraftTree.root_only(brace)
    assert allowed(tiny_target, constraint.apply(root, logits_NV[:1])[0]) == {
        tiny_target.tokenizer.decode([end])
    }
    constraint.append([end, other, other])
    assert torch.nonzero(constraint.apply(root, logits_NV[:1])[0] == 0)[:, 0].tolist() == [end]


def answers(
    target: Target, grammars: JsonGrammars, schema: Any, *, speculates: bool, temperature: float
) -> Iterator[str]:
    """Of several seeds at once; drafts are copies of what the answer has had before."""
    config = DecodeConfig(
        max_context=1000,
        total_tokens=8 if speculates else 1,
        ngram_match=1 if speculates else 0,
    )
    decoder = SpeculativeDecoder(target, None, config)
    requests = [
        Request(
            (1, *range(40 + seed, 50 + seed)),
            400,
            SamplingSettings(temperature=temperature),
            seed,
            constraint=grammars.constraint(json.dumps(schema)),
        )
        for seed in range(6)
    ]
    names = {decoder.submit(request): seed for seed, request in enumerate(requests)}
    tokens: dict[int, list[int]] = {seed: [] for seed in range(6)}
    accepted = 0
    while decoder.busy:
        for event in decoder.step():
            tokens[names[event.request_id]] += event.round.tokens
            accepted += sum(event.round.drafted)
            assert event.ending != "length"
    if speculates:
        assert accepted, "some guess was right"
    for found in tokens.values():
        assert found[-1] in target.eos_token_ids
        yield str(target.tokenizer.decode(found[:-1]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_random_weights_speak_json_and_speculation_does_not_show(
    tiny_target: Target, grammars: JsonGrammars, temperature: float
) -> None:
    plain, speculated = (
        list(answers(tiny_target, grammars, PERSON, speculates=one, temperature=temperature))
        for one in (False, True)
    )
    assert plain == speculated
    for text in plain:
        person = json.loads(text)
        assert person.keys() == {"name", "age", "tags"}
        assert isinstance(person["name"], str) and len(person["name"]) <= 12
        assert 0 <= person["age"] <= 150 and set(person["tags"]) <= {"a", "bc"}


def test_a_schema_is_read_once_and_each_answer_goes_its_own_way(
    tiny_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars = JsonGrammars(
        tiny_target.tokenizer, tiny_target.vocab_size, tiny_target.eos_token_ids
    )
    compiled, read = grammars._compiled, []

    def count(schema: str) -> Any:
        read.append(schema)
        return compiled(schema)

    monkeypatch.setattr(grammars, "_compiled", count)
    number, root = json.dumps(ONE_NUMBER), DraftTree.root_only(0)
    logits_NV = torch.zeros(1, tiny_target.vocab_size)
    with ThreadPoolExecutor(4) as threads:
        first, second, *_ = threads.map(grammars.constraint, [number] * 8)
        again = len(read)
        first.append(tiny_target.tokenizer('{"a"')["input_ids"])
        assert allowed(tiny_target, second.apply(root, logits_NV)[0]) == {"{"}
        assert allowed(tiny_target, first.apply(root, logits_NV)[0]) == {":", " ", "\n"}
        grammars.constraint(number)
        assert len(read) == again
    # Those that nobody has asked for lately are forgotten.
    for size in range(MOST_SCHEMAS):
        grammars.constraint(json.dumps({"type": "string", "maxLength": size}))
    grammars.constraint(number)
    assert read[-1] == number and len(grammars._begun) == MOST_SCHEMAS


@pytest.mark.parametrize(
    "schema",
    ["", "[", '{"type": "nothing"}', '{"$ref": "http://x/y"}', '{"type": 5}', "true",
     '{"type": "string", "pattern": "("}', '{"not":' * 200 + "{}" + "}" * 200],
)  # fmt: skip
def test_what_is_no_schema_is_refused(grammars: JsonGrammars, schema: str) -> None:
    with pytest.raises(InputError, match="the JSON schema cannot be used"):
        grammars.constraint(schema)
