"""Many prompts at once: the tokens of each alone, whatever its neighbours."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from core.config import DecodeConfig
from core.decode.batch import Answer, BatchCounts, answer_all
from core.decode.engine import SpeculativeDecoder
from core.decode.requests import Request
from core.decode.sampling import SamplingSettings
from core.models.target import Target

GREEDY = SamplingSettings()
SAMPLED = SamplingSettings(temperature=1.0, top_p=0.9, top_k=40)
# Random weights seldom end a turn: these bytes do it in their place.
STOPS = frozenset(range(3, 12))


def _requests(count: int, settings: SamplingSettings = GREEDY) -> list[tuple[int, Request]]:
    random = np.random.default_rng(0)
    return [
        (i, Request(random.integers(3, 250, int(random.integers(1, 40))).tolist(),
                    int(random.integers(1, 50)), settings, 1000 + i, STOPS))
        for i in range(count)
    ]  # fmt: skip


def _decoder(target: Target, batch_size: int, cache_tokens: int = 4096) -> SpeculativeDecoder:
    config = DecodeConfig(
        total_tokens=1, max_context=400, batch_size=batch_size, cache_tokens=cache_tokens,
        max_waiting=batch_size, prefill_chunk=64,
    )  # fmt: skip
    return SpeculativeDecoder(target, None, config)


def _run(
    decoder: SpeculativeDecoder, requests: list[tuple[int, Request]]
) -> tuple[dict[int, Answer], BatchCounts]:
    found: dict[int, Answer] = {}
    counts = BatchCounts()
    answer_all(decoder, requests, found.__setitem__, counts)
    return found, counts


@torch.inference_mode()
def _alone(target: Target, request: Request) -> Answer:
    """Greedy, without a cache."""
    ids = list(request.prompt_ids)
    new: list[int] = []
    while len(new) < request.max_new_tokens:
        token = int(target.model(torch.tensor([ids + new])).logits[0, -1].argmax())
        if token in request.stop_token_ids | target.eos_token_ids:
            return Answer(tuple(new), cut=False)
        new.append(token)
    return Answer(tuple(new), cut=True)


@pytest.mark.parametrize(("batch_size", "cache_tokens"), [(1, 4096), (3, 4096), (8, 256)])
def test_greedy_answers_are_those_of_each_prompt_alone(
    tiny_target: Target, batch_size: int, cache_tokens: int
) -> None:
    """Also where the cache holds but a few of them at a time."""
    requests = _requests(25)
    found, counts = _run(_decoder(tiny_target, batch_size, cache_tokens), requests)
    wanted = {key: _alone(tiny_target, request) for key, request in requests}
    assert found == wanted
    assert {answer.cut for answer in found.values()} == {True, False}
    ended = sum(len(answer.token_ids) + (not answer.cut) for answer in wanted.values())
    assert counts.new_tokens == ended
    assert counts.prompt_tokens == sum(len(request.prompt_ids) for _, request in requests)


def test_samples_depend_on_the_request_alone(tiny_target: Target) -> None:
    requests = _requests(20, SAMPLED)
    alone, _ = _run(_decoder(tiny_target, 1), requests)
    together, _ = _run(_decoder(tiny_target, 7), requests[::-1])
    assert together == alone
    _, first = requests[0]
    seeds = [(seed, dataclasses.replace(first, max_new_tokens=30, seed=seed)) for seed in (1, 2)]
    other, _ = _run(_decoder(tiny_target, 1), seeds)
    assert other[1] != other[2]


def test_the_batch_stays_full_to_the_end(tiny_target: Target) -> None:
    requests = [(i, Request([20 + i] * (1 + i % 30), 40, seed=i)) for i in range(60)]
    found, counts = _run(_decoder(tiny_target, 6), requests)
    assert len(found) == 60
    assert counts.places == 6 * counts.passes
    assert counts.new_tokens / counts.places > 0.8


def test_follow_ups_are_answered_too(tiny_target: Target) -> None:
    """Each much longer than all before, and before those that wait: the cache has its beginning."""
    decoder, counts = _decoder(tiny_target, 2), BatchCounts()
    seen: list[tuple[int, int]] = []
    current = {n: Request([40 + n] * 9, 5) for n in range(3)}
    turns = dict.fromkeys(range(3), 1)

    def follow(number: int, answer: Answer) -> Request | None:
        request, turn = current[number], turns[number]
        seen.append((number, turn))
        assert answer == _alone(tiny_target, request)
        if turn == 3:
            return None
        turns[number] += 1
        ids = [*request.prompt_ids, *answer.token_ids, *range(20, 150 + turn)]
        current[number] = Request(ids, 5)
        return current[number]

    answer_all(decoder, list(current.items()), follow, counts)
    assert sorted(seen) == [(n, turn) for n in range(3) for turn in (1, 2, 3)]
    assert seen.index((0, 3)) < seen.index((2, 1))
