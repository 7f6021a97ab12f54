"""What a round tells of its tree, and requests that want no tree beside others that have one."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from core.config import DecodeConfig
from core.decode.batch_policy import BatchPolicy
from core.decode.costs import BatchCosts, CostModel
from core.decode.engine import SpeculativeDecoder
from core.decode.requests import Request, Round
from core.decode.sampling import SamplingSettings
from core.decode.tree import PLAIN, TreePlan
from core.models.target import Target
from tests.oracle import OracleDrafter, hf_greedy

Text = tuple[int, ...]
COUNT = 20


@pytest.fixture(scope="module")
def answers(tiny_target: Target) -> dict[Text, Text]:
    draw = random.Random(1)
    prompts = [(1, *(draw.randrange(3, 259) for _ in range(12))) for _ in range(6)]
    return {prompt: hf_greedy(tiny_target, prompt, COUNT) for prompt in prompts}


def decoder_of(target: Target, answers: dict[Text, Text]) -> SpeculativeDecoder:
    drafter = OracleDrafter(answers, target.vocab_size, skill=0.7)
    config = DecodeConfig(total_tokens=8, depth=4, top_k=3, max_context=128)
    return SpeculativeDecoder(target, None, config, drafter=drafter)


def rounds_of(decoder: SpeculativeDecoder, requests: list[Request]) -> list[list[Round]]:
    """Of requests that are decoded together."""
    numbers = [decoder.submit(request) for request in requests]
    found: dict[int, list[Round]] = {number: [] for number in numbers}
    while decoder.busy:
        for event in decoder.step():
            found[event.request_id].append(event.round)
    return [found[number] for number in numbers]


def tokens_of(rounds: list[Round]) -> Text:
    return tuple(token for one in rounds for token in one.tokens)


def test_a_round_tells_its_tree_where_it_is_asked_to(
    tiny_target: Target, answers: dict[Text, Text]
) -> None:
    requests = [Request(prompt, COUNT, with_trees=True) for prompt in answers]
    deepest = 0
    for request, rounds in zip(
        requests, rounds_of(decoder_of(tiny_target, answers), requests), strict=True
    ):
        assert tokens_of(rounds) == answers[tuple(request.prompt_ids)]
        assert rounds[0].tree is None and rounds[0].path == (), "the prompt's pass has none"
        last = rounds[0].tokens[-1]
        for one in rounds[1:]:
            assert one.tree is not None and one.tree.size == one.tree_size
            assert one.tree.token_ids_N[0] == last and one.path[0] == 0
            parents = [one.tree.parents[node] for node in one.path[1:]]
            assert parents == list(one.path[:-1]), "a way from the root"
            accepted = one.tree.token_ids_N[torch.tensor(one.path[1:], dtype=torch.long)].tolist()
            assert [*accepted, one.tokens[-1]][: len(one.tokens)] == list(one.tokens)
            deepest, last = max(deepest, len(accepted)), one.tokens[-1]
    assert deepest > 1, "too few accepted paths to show anything"
    silent = rounds_of(decoder_of(tiny_target, answers), [Request(next(iter(answers)), COUNT)])[0]
    assert all(one.tree is None and one.path == () for one in silent)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_who_wants_no_tree_gets_a_token_a_round_beside_those_who_do(
    tiny_target: Target, answers: dict[Text, Text], adaptive: bool, temperature: float
) -> None:
    settings = SamplingSettings(temperature=temperature)
    asked = [Request(prompt, COUNT, settings, seed=3) for prompt in answers]
    alone = SpeculativeDecoder(tiny_target, None, DecodeConfig(max_context=128))
    wanted = {tuple(one.prompt_ids): tokens_of(rounds_of(alone, [one])[0]) for one in asked}
    assert (wanted == answers) == (temperature == 0)
    decoder = decoder_of(tiny_target, wanted)
    if adaptive:
        # Nodes that cost next to nothing: it drafts wherever it may.
        costs = CostModel(BatchCosts({1: 1.0, 64: 1.1}, 0.0, {1: 0.01}, {1: 0.01}))
        decoder.policy = BatchPolicy(costs, TreePlan(8, 4, 3))
    requests = [replace(one, plan=plan) for one in asked for plan in (None, PLAIN)]
    found = rounds_of(decoder, requests)
    for request, rounds in zip(requests, found, strict=True):
        assert tokens_of(rounds) == wanted[tuple(request.prompt_ids)]
    guessed, plain = found[::2], found[1::2]
    for one in (one for rounds in plain for one in rounds):
        assert len(one.tokens) == 1 and one.tree_size <= 1 and one.drafted == (False,)
    assert any(one.tree_size > 1 for rounds in guessed for one in rounds)
    assert sum(map(len, guessed)) < sum(map(len, plain)), "and the others still guess"
