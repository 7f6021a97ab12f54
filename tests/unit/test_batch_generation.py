"""Many prompts at once: the tokens of each alone, whatever its neighbours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from core.decode.batch import (
    FIRST_CANDIDATES,
    Answer,
    BatchGenerator,
    Request,
    candidates,
    choose,
)
from core.decode.sampling import SamplingSettings, target_probs
from core.models.target import Target

GREEDY = SamplingSettings()
SAMPLED = SamplingSettings(temperature=1.0, top_p=0.9, top_k=40)


def _requests(count: int, seed: int = 0) -> list[Request]:
    random = np.random.default_rng(seed)
    return [
        Request(i, random.integers(3, 250, int(random.integers(1, 40))).tolist(),
                int(random.integers(1, 50)), seed=1000 + i)
        for i in range(count)
    ]  # fmt: skip


def _run(
    target: Target, requests: list[Request], batch_size: int, settings: SamplingSettings
) -> tuple[dict[int, Answer], BatchGenerator]:
    # Random weights seldom end a turn: these bytes do it in their place.
    stops = frozenset(range(3, 12))
    generator = BatchGenerator(target, settings, batch_size, stops)
    found: dict[int, Answer] = {}

    def keep(request: Request, answer: Answer) -> None:
        found[request.key] = answer

    generator.run(requests, keep)
    return found, generator


@torch.inference_mode()
def _alone(target: Target, request: Request, stops: frozenset[int]) -> Answer:
    """Greedy, without a cache."""
    ids = list(request.prompt_ids)
    new: list[int] = []
    while len(new) < request.max_new_tokens:
        token = int(target.model(torch.tensor([ids + new])).logits[0, -1].argmax())
        if token in stops:
            return Answer(tuple(new), cut=False)
        new.append(token)
    return Answer(tuple(new), cut=True)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_greedy_answers_are_those_of_each_prompt_alone(
    tiny_target: Target, batch_size: int
) -> None:
    requests = _requests(25)
    found, generator = _run(tiny_target, requests, batch_size, GREEDY)
    wanted = {r.key: _alone(tiny_target, r, generator.stops) for r in requests}
    assert found == wanted
    assert {answer.cut for answer in found.values()} == {True, False}


def test_samples_depend_on_the_request_alone(tiny_target: Target) -> None:
    requests = _requests(20)
    alone, _ = _run(tiny_target, requests, 1, SAMPLED)
    together, _ = _run(tiny_target, requests[::-1], 7, SAMPLED)
    assert together == alone
    other, _ = _run(tiny_target, [Request(0, [40] * 5, 30, seed) for seed in (1,)], 1, SAMPLED)
    again, _ = _run(tiny_target, [Request(0, [40] * 5, 30, seed) for seed in (2,)], 1, SAMPLED)
    assert other != again


def test_rows_are_refilled_and_slots_reused(tiny_target: Target) -> None:
    """Far more passes than slots, in a batch that stays full to the end."""
    requests = [Request(i, [20 + i] * (1 + i % 30), 40, i) for i in range(60)]
    generator = BatchGenerator(tiny_target, GREEDY, 6)
    found: dict[int, Answer] = {}

    def keep(request: Request, answer: Answer) -> None:
        found[request.key] = answer

    generator.run(requests, keep)
    counts = generator.counts
    assert counts.passes > 2 * (70 + 70 // 4 + 64)
    assert counts.new_tokens >= sum(len(answer.token_ids) for answer in found.values())
    assert counts.decoded_tokens / counts.decoded_rows > 0.8
    assert all(found[r.key] == _alone(tiny_target, r, generator.stops) for r in requests[::7])


def test_a_free_row_uses_up_no_slots(tiny_target: Target) -> None:
    """It may stay free for longer than the slots that its own sequence would have left it."""
    short = Request(0, [20] * 300, 5)
    requests = [short, *(Request(i, [20 + i], 305 - i) for i in range(1, 5))]
    generator = BatchGenerator(tiny_target, GREEDY, 5)
    found: dict[int, Answer] = {}

    def keep(request: Request, answer: Answer) -> None:
        found[request.key] = answer

    generator.run(requests, keep)
    assert max(len(answer.token_ids) for answer in found.values()) > 200
    assert all(found[r.key] == _alone(tiny_target, r, generator.stops) for r in requests[:2])


def test_follow_ups_are_answered_too(tiny_target: Target) -> None:
    """Each much longer than all before: the slots grow with them."""
    generator = BatchGenerator(tiny_target, GREEDY, 2)
    seen: list[Any] = []

    def follow(request: Request, answer: Answer) -> Request | None:
        number, turn = request.key
        seen.append(request.key)
        assert answer == _alone(tiny_target, request, generator.stops)
        if turn == 3:
            return None
        ids = [*request.prompt_ids, *answer.token_ids, *range(20, 150 + turn)]
        return Request((number, turn + 1), ids, 5)

    generator.run([Request((n, 1), [40 + n], 5) for n in range(3)], follow)
    assert sorted(seen) == [(n, turn) for n in range(3) for turn in (1, 2, 3)]


@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(0.7),
        SamplingSettings(1.0, top_p=0.5),
        SamplingSettings(5.0, top_p=0.999),
        SamplingSettings(1.3, top_k=7),
        SamplingSettings(1.3, top_p=0.6, top_k=7),
        SamplingSettings(3.0, top_p=0.9, top_k=FIRST_CANDIDATES + 50),
    ],
)
def test_candidates_are_the_decoders_distribution(settings: SamplingSettings) -> None:
    logits = torch.randn(4, 3 * FIRST_CANDIDATES, generator=torch.Generator().manual_seed(0)) * 3
    probs, tokens = candidates(logits, settings)
    found = torch.zeros_like(logits).scatter(-1, tokens, probs / probs.sum(-1, keepdim=True))
    torch.testing.assert_close(found, target_probs(logits, settings), rtol=1e-4, atol=1e-7)


def test_choices_follow_the_distribution() -> None:
    probs = torch.tensor([0.5, 0.0, 0.3, 0.2])
    settings = SamplingSettings(1.0, top_p=0.99)
    grid = ((np.arange(1000) + 0.5) / 1000).tolist()
    chosen = choose(probs.log().expand(1000, 4), settings, grid)
    counts = np.bincount(chosen, minlength=4)
    assert counts.tolist() == pytest.approx([500, 0, 300, 200], abs=1)
    assert choose(probs.log()[None], settings, [0.0]) == [0]
    assert choose(probs.log()[None], SamplingSettings(1.0), [1 - 1e-16]) == [3]
