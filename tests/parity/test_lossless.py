"""At temperature 0 speculation changes no token: HF's own `generate` is the reference."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.config import DRAFT_CONFIGS, DecodeConfig
from core.decode import engine
from core.decode.batch_policy import BatchPolicy, PolicyRound
from core.decode.costs import BatchCosts, CostModel
from core.decode.engine import SpeculativeDecoder
from core.decode.requests import Request, Round
from core.decode.sampling import SamplingSettings
from core.decode.tree import PLAIN, TreePlan
from core.draft.base import DraftHead, DraftOutput
from core.draft.vocabulary import DraftVocabulary
from core.models.target import Target
from tests.heads import OracleHead, random_head
from tests.oracle import hf_greedy

NEW_TOKENS = 12
# The oracle is told the first token of a prompt, so all begin alike, as chats do.
PROMPTS = ([1, 40, 41, 99, 7], [1, 250], [1, *range(30, 90, 3)])
# (depth, top_k): a chain, no expansion at all, narrow and deep, as published.
SHAPES = ((4, 1), (0, 60), (6, 4), (5, 10))


def _tokens(rounds: Sequence[Round]) -> tuple[int, ...]:
    return tuple(token for done in rounds for token in done.tokens)


def _decoder(target: Target, head: DraftHead | None, ngram_match: int = 0) -> SpeculativeDecoder:
    config = DecodeConfig(max_context=256, ngram_match=ngram_match)
    return SpeculativeDecoder(target, head, config)


@pytest.fixture(scope="module")
def expected(tiny_target: Target) -> dict[tuple[int, ...], tuple[int, ...]]:
    """HF's own greedy answers."""
    return {tuple(p): hf_greedy(tiny_target, p, NEW_TOKENS) for p in PROMPTS}


@pytest.fixture(scope="module")
def deep_expected(deep_target: Target) -> dict[tuple[int, ...], tuple[int, ...]]:
    """HF's own greedy answers of the deep target."""
    return {tuple(p): hf_greedy(deep_target, p, NEW_TOKENS) for p in PROMPTS}


@pytest.fixture(scope="module")
def oracle(tiny_target: Target, tiny_target_folder: Path) -> OracleHead:
    head = OracleHead.of(tiny_target, tiny_target_folder, skill=0.7)
    head.start(PROMPTS[0][0])
    return head


def _sizes(depth: int, top_k: int) -> list[int]:
    most = 1 + top_k + depth * top_k**2
    return [size for size in range(1, 61) if size <= most]


def test_plain_decoding_is_hf_generate(tiny_target: Target, expected) -> None:
    decoder = _decoder(tiny_target, None)
    for prompt in PROMPTS:
        rounds = list(decoder.generate(prompt, max_new_tokens=NEW_TOKENS))
        assert _tokens(rounds) == expected[tuple(prompt)]
        assert all(done.tree_size == 1 for done in rounds[1:])


@pytest.mark.parametrize(("depth", "top_k"), SHAPES)
def test_greedy_output_is_hf_generate_at_every_tree_size(
    tiny_target: Target, oracle: OracleHead, expected, depth: int, top_k: int
) -> None:
    decoder = _decoder(tiny_target, oracle)
    accepted = rounds_run = 0
    for size in _sizes(depth, top_k):
        # All prompts at some sizes, one of them in turn at the others.
        chosen = PROMPTS if size in (2, 16, 60) else (PROMPTS[size % len(PROMPTS)],)
        for prompt in chosen:
            rounds = list(
                decoder.generate(
                    prompt, max_new_tokens=NEW_TOKENS, plan=TreePlan(size, depth, top_k)
                )
            )
            assert _tokens(rounds) == expected[tuple(prompt)], f"size {size}, prompt {prompt}"
            assert all(done.tree_size == size for done in rounds[1:])
            accepted += sum(len(done.ranks) for done in rounds)
            rounds_run += len(rounds) - 1
    assert accepted > 0.4 * rounds_run, "too few accepted paths to show anything"


def test_levels_may_be_of_any_width_and_drafts_may_pause(
    tiny_target: Target, oracle: OracleHead, expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the policy leaves to chance here: the oracle sees to it that masks fit the text."""
    draw = random.Random(0)
    monkeypatch.setattr(engine, "MOST_UNREAD", 4)
    decoder = _decoder(tiny_target, oracle)
    costs = BatchCosts({1: 1.0, 64: 1.0}, 0.0, {1: 0.0}, {1: 0.0})
    ticks = count(0.0)
    decoder.policy = policy = BatchPolicy(
        CostModel(costs), TreePlan(24, 4, 4), clock=ticks.__next__
    )
    begin, widths = policy.begin, []

    def begin_at_random(*given: Any, **named: Any) -> PolicyRound:
        return replace(begin(*given, **named), drafts=draw.random() < 0.6)

    def any_width(*given: Any) -> int:
        widths.append(draw.randint(0, 4))
        return widths[-1]

    monkeypatch.setattr(policy, "begin", begin_at_random)
    monkeypatch.setattr(policy, "width", any_width)
    unread = []
    for _ in range(4):
        ids = {decoder.submit(Request(prompt, NEW_TOKENS)): tuple(prompt) for prompt in PROMPTS}
        found: dict[int, tuple[int, ...]] = dict.fromkeys(ids, ())
        while decoder.busy:
            for event in decoder.step():
                found[event.request_id] += event.round.tokens
            unread += [sequence.num_unread for sequence in decoder.scheduler.running]
        assert {ids[one]: tokens for one, tokens in found.items()} == expected
    assert set(widths) == set(range(5))
    # A round, which commits up to six tokens, goes beyond what may wait; the next one reads it.
    longest = max(len(prompt) for prompt in PROMPTS)
    assert max(one for one in unread if one < longest) <= 4 + 6


@pytest.mark.parametrize("drafts", [True, False])
def test_greedy_output_is_hf_generate_with_copied_drafts(
    tiny_target: Target, oracle: OracleHead, drafts: bool
) -> None:
    """Merged with a head's tree, and alone. Of three tokens, the text soon repeats itself."""
    bias = dict.fromkeys((30, 31, 32), 100.0)
    decoder = _decoder(tiny_target, oracle if drafts else None, ngram_match=2)
    prompt = PROMPTS[2]
    wanted = hf_greedy(
        tiny_target, prompt, 40, sequence_bias={(token,): value for token, value in bias.items()}
    )
    accepted = 0
    for plan in (TreePlan(2, 1, 2), TreePlan(9, 6, 4), TreePlan(16, 4, 4)):
        rounds = list(
            decoder.generate(
                prompt, max_new_tokens=40, sampling=SamplingSettings(logit_bias=bias), plan=plan
            )
        )
        assert _tokens(rounds) == wanted
        assert all(done.tree_size <= plan.total_tokens for done in rounds)
        accepted += sum(len(done.ranks) for done in rounds)
    assert accepted > 20, "too few accepted tokens to show anything"


def test_greedy_output_under_penalties_is_hf_generate(
    tiny_target: Target, oracle: OracleHead, expected
) -> None:
    """A penalty counts the tokens of the path that a node ends, which the oracle knows not of."""
    bias = {30: 2.0, 31: -3.0, 200: 1.5}
    settings = SamplingSettings(repetition_penalty=1.4, logit_bias=bias)
    decoder = _decoder(tiny_target, oracle, ngram_match=1)
    accepted = 0
    for prompt in PROMPTS:
        wanted = hf_greedy(
            tiny_target,
            prompt,
            NEW_TOKENS,
            repetition_penalty=1.4,
            sequence_bias={(token,): value for token, value in bias.items()},
        )
        assert wanted != expected[tuple(prompt)]
        for plan in (PLAIN, TreePlan(16, 3, 4), TreePlan(40, 5, 10)):
            rounds = list(
                decoder.generate(prompt, max_new_tokens=NEW_TOKENS, sampling=settings, plan=plan)
            )
            assert _tokens(rounds) == wanted
            accepted += sum(len(done.ranks) for done in rounds)
    assert accepted > 10, "too few accepted tokens to show anything"


def test_log_probabilities_stand_beside_their_tokens(
    tiny_target: Target, oracle: OracleHead
) -> None:
    """Those of a pass over the whole answer, cut where the answer is."""
    rounds = list(
        _decoder(tiny_target, oracle).generate(
            PROMPTS[0],
            max_new_tokens=NEW_TOKENS,
            sampling=SamplingSettings(1.0, logprobs=2),
            seed=3,
            plan=TreePlan(40, 5, 10),
        )
    )
    assert any(len(done.tokens) > 1 for done in rounds)
    found = [one for done in rounds for one in done.logprobs]
    answer = _tokens(rounds)
    assert tuple(one.token_id for one in found) == answer
    text_1T = torch.tensor([[*PROMPTS[0], *answer]])
    logprobs_TV = tiny_target.model(text_1T).logits[0, len(PROMPTS[0]) - 1 : -1].log_softmax(-1)
    for one, row_V in zip(found, logprobs_TV, strict=True):
        best = row_V.topk(2)
        assert one.logprob == pytest.approx(float(row_V[one.token_id]), abs=1e-3)
        assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=1e-3)


@pytest.mark.parametrize("vocab_size", [259, 64])
@pytest.mark.parametrize("kind", DRAFT_CONFIGS)
def test_greedy_output_is_hf_generate_with_a_random_head(
    deep_target: Target, deep_target_folder: Path, deep_expected, kind: str, vocab_size: int
) -> None:
    """Every draft is wrong, and with a small draft vocabulary most tokens cannot be drafted."""
    size = deep_target.vocab_size
    vocabulary = DraftVocabulary(torch.arange(0, size, -(-size // vocab_size)), size)
    head = random_head(deep_target, deep_target_folder, vocabulary=vocabulary, kind=kind)
    decoder = _decoder(deep_target, head)
    for plan in (TreePlan(2, 0, 1), TreePlan(9, 6, 4), TreePlan(60, 5, 10)):
        for prompt in PROMPTS:
            rounds = list(decoder.generate(prompt, max_new_tokens=NEW_TOKENS, plan=plan))
            assert _tokens(rounds) == deep_expected[tuple(prompt)]


@pytest.mark.parametrize("kind", DRAFT_CONFIGS)
def test_a_head_reads_the_true_features_of_its_layers(
    deep_target: Target, deep_target_folder: Path, kind: str
) -> None:
    """What the engine hands a head are HF's hidden states of the committed text, in order."""
    head = random_head(deep_target, deep_target_folder, kind=kind)
    read: list[tuple[Tensor, Tensor]] = []
    extend_all = head.extend_all

    def noted(cache, places, counts, features_NLH: Tensor, next_ids_N: Tensor) -> DraftOutput:
        read.append((features_NLH, next_ids_N))
        return extend_all(cache, places, counts, features_NLH, next_ids_N)

    head.extend_all = noted  # type: ignore[method-assign]
    decoder = _decoder(deep_target, head)
    prompt = PROMPTS[2]
    rounds = list(decoder.generate(prompt, max_new_tokens=NEW_TOKENS, plan=TreePlan(16, 3, 4)))
    text = [*prompt, *_tokens(rounds)]
    features = torch.cat([features_TLH for features_TLH, _ in read])
    assert torch.cat([ids for _, ids in read]).tolist() == text[1 : len(features) + 1]
    states = deep_target.model(torch.tensor([text]), output_hidden_states=True).hidden_states
    layers = {"eagle1": (7,), "eagle3": (2, 3, 4, 7)}[kind]
    wanted = torch.stack([states[layer][0, : len(features)] for layer in layers], dim=1)
    torch.testing.assert_close(features, wanted, rtol=0, atol=4e-5)


def test_plain_decoding_computes_no_inner_features(
    deep_target: Target, deep_target_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The baseline of every speedup does not pay for the head."""
    decoder = _decoder(deep_target, random_head(deep_target, deep_target_folder, kind="eagle3"))
    asked: list[object] = []
    taken = Target.ragged_features

    def noted(self: Target, *args, **kwargs) -> Tensor:
        features_TLH = taken(self, *args, **kwargs)
        asked.append(features_TLH.shape[1])
        return features_TLH

    monkeypatch.setattr(Target, "ragged_features", noted)
    list(decoder.generate(PROMPTS[0], max_new_tokens=4, plan=PLAIN))
    assert set(asked) == {1}
    list(decoder.generate(PROMPTS[0], max_new_tokens=4, plan=TreePlan(8, 1, 4)))
    assert set(asked) == {1, 4}


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_limit_of_new_tokens_is_exact(
    tiny_target: Target, oracle: OracleHead, expected, count: int
) -> None:
    decoder = _decoder(tiny_target, oracle)
    rounds = list(decoder.generate(PROMPTS[0], max_new_tokens=count, plan=TreePlan(40, 5, 10)))
    assert _tokens(rounds) == expected[tuple(PROMPTS[0])][:count]
    for done in rounds:
        assert len(done.tokens) == len(done.drafted) > 0


def test_nothing_follows_a_stop_token(tiny_target: Target, oracle: OracleHead, expected) -> None:
    """Each token of the answer is a stop token once; it comes last, whoever drafted it."""
    decoder = _decoder(tiny_target, oracle)
    answer = expected[tuple(PROMPTS[0])]
    drafted_last = 0
    for stop in dict.fromkeys(answer):
        rounds = list(
            decoder.generate(
                PROMPTS[0],
                max_new_tokens=NEW_TOKENS,
                stop_token_ids=frozenset({stop}),
                plan=TreePlan(40, 5, 10),
            )
        )
        assert _tokens(rounds) == answer[: answer.index(stop) + 1]
        drafted_last += rounds[-1].drafted[-1]
    assert drafted_last, "no stop token was a drafted one"


def test_the_targets_end_token_stops(tiny_target: Target, oracle: OracleHead, expected) -> None:
    answer = expected[tuple(PROMPTS[0])]
    stopping = replace(tiny_target, eos_token_ids=frozenset({answer[5]}))
    decoder = _decoder(stopping, oracle)
    rounds = list(decoder.generate(PROMPTS[0], max_new_tokens=NEW_TOKENS, plan=TreePlan(8, 3, 4)))
    assert _tokens(rounds) == answer[: answer.index(answer[5]) + 1]
    assert _tokens(rounds) == hf_greedy(stopping, PROMPTS[0], NEW_TOKENS)


def test_a_full_context_is_decoded_to_its_end(
    tiny_target: Target, tiny_target_folder: Path
) -> None:
    """The draft expands more rows than the tree keeps nodes; there must be room for them."""
    prompt = [1, *range(20, 60)]
    wanted = hf_greedy(tiny_target, prompt, 20)
    config = DecodeConfig(max_context=len(prompt) + 20 + 6, total_tokens=6, depth=5, top_k=10)
    head = random_head(tiny_target, tiny_target_folder)
    decoder = SpeculativeDecoder(tiny_target, head, config)
    assert _tokens(list(decoder.generate(prompt, max_new_tokens=20))) == wanted
