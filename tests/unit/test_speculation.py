from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from core.config import DecodeConfig
from core.decode.engine import SpeculativeDecoder
from core.decode.tree import PLAIN, TreePlan
from core.evaluate.speculation import (
    BASELINE,
    HF_GENERATE,
    HF_LOOKUP,
    NEAR_TIE,
    Difference,
    PromptResult,
    decode,
    find_difference,
    hf_generate,
    repetition_rate,
)
from core.models.target import Target
from tests.heads import OracleHead

PROMPT = [1, 40, 41, 99, 7]


@pytest.fixture(scope="module")
def decoder(tiny_target: Target, tiny_target_folder: Path) -> SpeculativeDecoder:
    head = OracleHead.of(tiny_target, tiny_target_folder, skill=0.7)
    head.start(PROMPT[0])
    return SpeculativeDecoder(tiny_target, head, DecodeConfig(max_context=128))


def test_an_answer_counts_passes_and_tokens(decoder: SpeculativeDecoder) -> None:
    answer = decode(decoder, "tree_16", PROMPT, 20, TreePlan(16, 4, 4))
    assert len(answer.token_ids) == 20 and (answer.seconds or 0) > 0
    assert (answer.way, answer.tree_size) == ("tree_16", 16.0)
    # The first token comes from the prompt's pass.
    assert sum(answer.accepted) == 19
    assert answer.rounds == len(answer.accepted) == len(answer.depths) < 19
    # All but the last pass commit what they accepted and the bonus token.
    assert answer.accepted[:-1] == tuple(depth + 1 for depth in answer.depths[:-1])
    assert answer.accepted[-1] <= answer.depths[-1] + 1


def test_all_ways_answer_alike(decoder: SpeculativeDecoder, tiny_target: Target) -> None:
    plain = decode(decoder, BASELINE, PROMPT, 12, PLAIN)
    assert plain.rounds == 11 and set(plain.accepted) == {1} and set(plain.depths) == {0}
    assert decode(decoder, "tree_8", PROMPT, 12, TreePlan(8, 3, 4)).token_ids == plain.token_ids
    theirs = hf_generate(tiny_target, PROMPT, 12)
    assert theirs.token_ids == plain.token_ids
    assert (theirs.way, theirs.rounds) == (HF_GENERATE, 0)
    copied = hf_generate(tiny_target, PROMPT, 12, lookup_tokens=3)
    assert (copied.way, copied.token_ids) == (HF_LOOKUP, plain.token_ids)


def test_differences(tiny_target: Target, decoder: SpeculativeDecoder) -> None:
    right = decode(decoder, BASELINE, PROMPT, 6, PLAIN).token_ids
    assert find_difference(tiny_target, PROMPT, right, list(right)) is None
    wrong = (*right[:3], (right[3] + 1) % 259, *right[4:])
    found = find_difference(tiny_target, PROMPT, right, wrong)
    logits_V = tiny_target.model(torch.tensor([[*PROMPT, *right[:3]]])).logits[0, -1]
    first, second = logits_V.topk(2).values.tolist()
    assert found is not None and found.position == 3
    assert found.gap == pytest.approx(first - second, abs=4e-5)
    assert not found.near_tie
    # float32 tells numbers near `first` apart down to 2^-23 of the power of two below it.
    assert found.steps == pytest.approx(
        found.gap / 2.0 ** (math.floor(math.log2(abs(first))) - 23), rel=1e-3
    )
    short = find_difference(tiny_target, PROMPT, right, right[:4])
    assert short is not None and short.position == 4
    long = find_difference(tiny_target, PROMPT, right, (*right, 5))
    assert long is not None and long.position == 6


def test_near_ties_are_those_that_rounding_explains() -> None:
    assert Difference(0, NEAR_TIE / 2, 1.0).near_tie
    assert not Difference(0, NEAR_TIE * 2, 1.0).near_tie


def test_results_survive_json(decoder: SpeculativeDecoder) -> None:
    answer = decode(decoder, "tree_8", PROMPT, 12, TreePlan(8, 3, 4))
    result = PromptResult(
        "a/1",
        "first_turn",
        5,
        "τext",
        {"tree_8": (answer, answer)},
        {"tree_8": Difference(3, 1e-5, 2.0)},
    )
    assert PromptResult.from_dict(json.loads(json.dumps(result.as_dict()))) == result
    untimed = result.untimed()
    assert result.timed and not untimed.timed
    assert PromptResult.from_dict(json.loads(json.dumps(untimed.as_dict()))) == untimed
    assert untimed.answers["tree_8"][1].token_ids == answer.token_ids


@pytest.mark.parametrize(
    ("token_ids", "rate"),
    [
        ([], 0),
        ([1, 2, 3], 0),
        ([1, 2, 3, 4, 5, 6], 0),
        ([5] * 8, 4 / 5),
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),
    ],
)
def test_repetition_rate(token_ids: list[int], rate: float) -> None:
    assert repetition_rate(token_ids) == pytest.approx(rate)
