"""Several requests at a time: a tiny target, drafts that are right in seven cases of ten."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from core.config import DecodeConfig
from core.decode.engine import SpeculativeDecoder
from core.decode.tree import PLAIN, TreePlan
from core.errors import InputError
from core.evaluate.batch_summary import summarize_batches
from core.evaluate.batches import PIECES, BatchRun, Question, check_batch, run_batch
from core.evaluate.speculation import BASELINE, decode
from core.evaluate.ways import CHOSEN, DecoderWay
from core.models.target import Target
from tests.oracle import OracleDrafter

NEW_TOKENS = 24
PROMPTS = [(1, *range(20 + 3 * n, 30 + 5 * n)) for n in range(7)]


@pytest.fixture(scope="module")
def questions(tiny_target: Target) -> list[Question]:
    plain = SpeculativeDecoder(tiny_target, None, DecodeConfig(max_context=128))
    return [
        Question(
            str(number),
            prompt,
            decode(plain, BASELINE, prompt, NEW_TOKENS, PLAIN).token_ids,
        )
        for number, prompt in enumerate(PROMPTS)
    ]


@pytest.fixture(scope="module")
def ways(tiny_target: Target, questions: list[Question]) -> dict[str, DecoderWay]:
    answers = {question.prompt_ids: question.wanted for question in questions}
    oracle = OracleDrafter(answers, tiny_target.vocab_size, 0.7)
    config = DecodeConfig(max_context=128, cache_tokens=1024, reuse_prefixes=False)
    decoder = SpeculativeDecoder(tiny_target, None, config, drafter=oracle)
    return {
        BASELINE: DecoderWay(BASELINE, decoder, PLAIN),
        CHOSEN: DecoderWay(CHOSEN, decoder, TreePlan(8, 4, 4)),
    }


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_the_loop_keeps_all_places_taken_while_time_counts(
    ways: dict[str, DecoderWay],
    questions: list[Question],
    batch_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = ways[CHOSEN].decoder
    at_work: list[int] = []
    step = decoder.step

    def counted():
        events = step()
        ended = sum(event.ending is not None for event in events)
        at_work.append(len(decoder.scheduler.running) + ended)
        return events

    monkeypatch.setattr(decoder, "step", counted)
    run = run_batch(ways[CHOSEN], questions, batch_size, NEW_TOKENS, repeat=2)
    asked = max(len(questions), 2 * batch_size)
    assert (run.answers, run.differences) == (asked, ())
    assert run.key == (0.0, batch_size, 2, CHOSEN, 0.0)
    full = next(n for n, count in enumerate([*at_work, 0]) if count < batch_size)
    assert max(at_work) == batch_size and at_work[full:] == sorted(at_work[full:], reverse=True)
    tokens = sum(tokens for tokens, _ in run.pieces)
    assert len(run.pieces) == min(PIECES, full)
    assert tokens < asked * NEW_TOKENS or batch_size == 1
    assert run.committed == asked * (NEW_TOKENS - 1), "the first tokens are the prompts' passes'"
    assert run.committed / run.passes > 1.5 and 6 < run.nodes / run.passes <= 8


def test_plain_decoding_verifies_a_node_a_pass(
    ways: dict[str, DecoderWay], questions: list[Question]
) -> None:
    run = run_batch(ways[BASELINE], questions, 3, NEW_TOKENS)
    assert run.nodes == run.passes == run.committed and not run.differences


def test_requests_that_come_at_random_join_batches_that_are_half_empty(
    ways: dict[str, DecoderWay], questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = ways[CHOSEN].decoder
    sizes: list[int] = []
    step = decoder.step

    def counted():
        events = step()
        sizes.append(len(decoder.scheduler.running))
        return events

    monkeypatch.setattr(decoder, "step", counted)
    run = run_batch(ways[CHOSEN], questions * 3, 4, NEW_TOKENS, arrivals=4.0)
    assert (run.answers, run.differences, run.pieces) == (21, (), ())
    assert {1, 2, 3} <= set(sizes), "no batch was half empty"


def test_an_answer_that_is_not_the_targets_is_found(
    ways: dict[str, DecoderWay], questions: list[Question]
) -> None:
    wanted = list(questions[2].wanted)
    wanted[9] = (wanted[9] + 1) % 259
    wrong = replace(questions[2], wanted=tuple(wanted))
    run = run_batch(ways[BASELINE], [questions[0], wrong], 2, NEW_TOKENS)
    assert [(one.id, one.position) for one in run.differences] == [("2", 9), ("2", 9)]
    assert all(not one.near_tie for one in run.differences)


def test_what_does_not_fit_together_is_refused(ways: dict[str, DecoderWay]) -> None:
    way = ways[CHOSEN]
    check_batch(way, PROMPTS[:5], NEW_TOKENS)
    with pytest.raises(InputError, match=r"of 9 requests .* 8 fit decode\.cache_tokens=1024"):
        check_batch(way, [tuple(range(80))] * 9, NEW_TOKENS)
    assert not way.decoder.busy


def test_rows_of_batch_sizes() -> None:
    def run(size: int, way: str, seconds: float, repeat: int, nodes: int) -> BatchRun:
        pieces = ((10, seconds), (10, seconds))
        return BatchRun(size, repeat, way, 0.0, pieces, 10, 10 * nodes, 17, 6, ())

    runs = [
        run(size, way, seconds * slow * size, repeat, nodes)
        for size in (4, 1)
        for repeat, slow in enumerate((1, 3))
        for way, seconds, nodes in ((BASELINE, 2.0, 1), (CHOSEN, 1.0, 6))
    ]
    one, four = summarize_batches(runs)
    assert (one["batch_size"], four["batch_size"]) == (1, 4)
    assert one["speedup"] == 2 and one["speedup_interval"] == (2, 2)
    assert one["tokens_per_second"] == pytest.approx((10 + 10 / 3) / 2)
    assert four["tokens_per_second"] == pytest.approx(one["tokens_per_second"] / 4)
    assert one["ways"][CHOSEN]["tree_size"] == 6
    assert one["ways"][CHOSEN]["accepted_length"] == 1.7
    assert one["ways"][BASELINE]["speedup"] == 1
    assert (one["lossless_identical"], one["lossless_total"]) == (24, 24)
    assert math.isclose(one["baseline_tokens_per_second"], one["tokens_per_second"] / 2)
