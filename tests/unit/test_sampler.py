"""One request's penalties, seed and log-probabilities."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from core.decode.penalties import Penalties
from core.decode.sampler import Sampler
from core.decode.sampling import SamplingSettings
from core.decode.tree import DraftTree

SIZE = 12
PROMPT = [3, 9, 3, 0]
BIAS = {1: 2.5, 3: -1.0, 11: 0.5}
#        0 (5)
#      /      \
#     1 (1)    2 (2)
#    / \         \
#   3 (3) 4 (1)   5 (1)
TREE = DraftTree(torch.tensor([5, 1, 2, 3, 1, 1]), (-1, 0, 0, 1, 1, 2), (0, 1, 2, 3, 4, 5))
PATHS: list[tuple[int, ...]] = [(), (1,), (2,), (1, 3), (1, 1), (2, 1)]


def _logits(rows: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(seed))


def _penalties(asked: SamplingSettings, output: Sequence[int]) -> Penalties:
    penalties = Penalties(asked, PROMPT)
    penalties.append(output)
    return penalties


def test_repetition_and_bias_are_hfs_on_every_path() -> None:
    asked = SamplingSettings(repetition_penalty=1.7, logit_bias=BIAS)
    output = [7, 5]
    logits_NV = _logits(TREE.size)
    before_NV = logits_NV.clone()
    found_NV = _penalties(asked, output).apply(TREE, logits_NV)
    assert torch.equal(logits_NV, before_NV)
    for node, path in enumerate(PATHS):
        text_1T = torch.tensor([[*PROMPT, *output, *path]])
        bias = SequenceBiasLogitsProcessor({(token,): value for token, value in BIAS.items()})
        row_1V = bias(text_1T, logits_NV[node][None])
        row_1V = RepetitionPenaltyLogitsProcessor(1.7)(text_1T, row_1V)
        torch.testing.assert_close(found_NV[node][None], row_1V)


def test_frequency_and_presence_count_the_output_alone() -> None:
    asked = SamplingSettings(presence_penalty=0.7, frequency_penalty=0.25)
    output = [9, 7, 9, 5]
    logits_NV = _logits(TREE.size)
    found_NV = _penalties(asked, output).apply(TREE, logits_NV)
    for node, path in enumerate(PATHS):
        wanted_V = logits_NV[node].clone()
        for token, count in Counter([*output, *path]).items():
            wanted_V[token] -= 0.7 + 0.25 * count
        torch.testing.assert_close(found_NV[node], wanted_V)


_settings = st.builds(
    SamplingSettings,
    temperature=st.just(1.0),
    repetition_penalty=st.sampled_from([0.8, 1.0, 1.5]),
    presence_penalty=st.sampled_from([-0.5, 0.0, 1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.3]),
    logit_bias=st.sampled_from([{}, BIAS, {4: -math.inf}]),
)


@given(_settings, st.lists(st.integers(0, SIZE - 1), max_size=6))
@settings(max_examples=60)
def test_a_node_is_penalized_as_its_text_would_be(
    asked: SamplingSettings, output: list[int]
) -> None:
    logits_NV = _logits(TREE.size)
    found_NV = _penalties(asked, output).apply(TREE, logits_NV)
    for node, path in enumerate(PATHS):
        alone = _penalties(asked, [*output, *path])
        row_1V = alone.apply(DraftTree.root_only(0), logits_NV[node][None])
        torch.testing.assert_close(found_NV[node][None], row_1V)


def test_without_penalties_logits_are_passed_on() -> None:
    logits_NV = _logits(TREE.size).bfloat16()
    assert _penalties(SamplingSettings(1.0), [4]).apply(TREE, logits_NV) is logits_NV


def test_greedy_takes_the_argmax_behind_the_penalties() -> None:
    logits_NV = torch.zeros(TREE.size, SIZE)
    logits_NV[:, 1], logits_NV[:, 4] = 2.0, 1.5
    assert Sampler(SamplingSettings(), 0, PROMPT).verify(TREE, logits_NV).path == (0, 1, 4)
    # Once token 1 is in the output, token 4 is the better one.
    penalized = Sampler(SamplingSettings(presence_penalty=1.0), 0, PROMPT)
    found = penalized.verify(TREE, logits_NV)
    assert (found.path, found.bonus_id) == ((0, 1), 4)
    # Both have been said now.
    logits_NV[:, 6] = 1.2
    assert penalized.first(logits_NV[0]) == 6


@pytest.mark.parametrize(
    "asked",
    [
        SamplingSettings(1.0),
        SamplingSettings(0.7, 0.8, repetition_penalty=1.5, frequency_penalty=0.3),
    ],
)
def test_a_seeds_text_does_not_depend_on_the_trees(asked: SamplingSettings) -> None:
    """Logits are a function of the last token, so that any tree can be scored."""
    table_VV = _logits(SIZE, seed=5)
    accepted = 0
    for seed in range(40):
        texts = []
        for children in ((), (1, 2, 3), (7,), tuple(range(SIZE))):
            sampler = Sampler(asked, seed, PROMPT)
            text = [sampler.first(table_VV[PROMPT[-1]])]
            while len(text) < 12:
                tree = DraftTree(
                    torch.tensor([text[-1], *children]),
                    (-1, *(0,) * len(children)),
                    tuple(range(1 + len(children))),
                )
                found = sampler.verify(tree, table_VV[tree.token_ids_N])
                text += (int(tree.token_ids_N[node]) for node in found.path[1:])
                text.append(found.bonus_id)
                accepted += found.num_accepted_draft_tokens
            texts.append(text[:12])
        assert texts[0] == texts[1] == texts[2] == texts[3]
    assert accepted > 100


def test_no_seed_is_another_one_each_time() -> None:
    logits_NV = torch.zeros(1, 1000)
    root = DraftTree.root_only(0)
    drawn = [
        [Sampler(SamplingSettings(1.0), None, PROMPT).verify(root, logits_NV).bonus_id]
        for _ in range(6)
    ]
    assert len({tuple(one) for one in drawn}) > 1


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_log_probabilities_are_the_targets_own(temperature: float) -> None:
    asked = SamplingSettings(temperature, repetition_penalty=1.3, logit_bias=BIAS, logprobs=3)
    sampler = Sampler(asked, 4, PROMPT)
    first_V, logits_NV = _logits(1, seed=1)[0], _logits(TREE.size, seed=2)
    first = sampler.first(first_V)
    found = sampler.verify(TREE, logits_NV)
    tokens = [first, *(int(TREE.token_ids_N[node]) for node in found.path[1:]), found.bonus_id]
    rows_PV = torch.cat((first_V[None], logits_NV[list(found.path)])).log_softmax(-1)
    assert [one.token_id for one in sampler.logprobs] == tokens
    for one, row_V in zip(sampler.logprobs, rows_PV, strict=True):
        assert one.logprob == pytest.approx(float(row_V[one.token_id]), abs=1e-5)
        best = row_V.topk(3)
        assert [token for token, _ in one.top] == best.indices.tolist()
        assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_log_probabilities_of_the_chosen_tokens_alone() -> None:
    sampler = Sampler(SamplingSettings(logprobs=0), None, PROMPT)
    sampler.first(_logits(1)[0])
    assert [one.top for one in sampler.logprobs] == [()]
    silent = Sampler(SamplingSettings(), None, PROMPT)
    silent.first(_logits(1)[0])
    assert silent.logprobs == []
