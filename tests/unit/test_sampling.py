from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from core.config import DecodeConfig
from core.decode.sampling import FIRST_CANDIDATES, SamplingSettings, draw, pick, target_probs
from core.errors import InputError


@pytest.mark.parametrize("temperature", [0.2, 1.0, 1.8])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize(("top_k", "min_p"), [(0, 0.0), (3, 0.0), (200, 0.0), (0, 0.1), (50, 0.02)])
def test_the_distribution_is_that_of_hf_generate(
    temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    logits_BV = 4 * torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    wanted = warpers(torch.zeros(20, 1, dtype=torch.long), logits_BV.clone()).softmax(-1)
    found = target_probs(logits_BV, SamplingSettings(temperature, top_p, top_k, min_p))
    assert torch.equal(found > 0, wanted > 0)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_a_wide_nucleus_is_found_among_more_candidates() -> None:
    logits_V = torch.randn(20 * FIRST_CANDIDATES, generator=torch.Generator().manual_seed(0))
    settings = SamplingSettings(1.0, top_p=0.9)
    probs_V, order_V = logits_V.softmax(-1).sort(descending=True)
    kept = order_V[: int((probs_V.cumsum(-1) < 0.9).sum()) + 1]
    assert len(kept) > 8 * FIRST_CANDIDATES
    found_V = target_probs(logits_V, settings)
    assert set(found_V.nonzero()[:, 0].tolist()) == set(kept.tolist())


def test_the_nucleus_is_the_smallest_that_reaches_top_p() -> None:
    probs_V = torch.tensor([0.1, 0.5, 0.05, 0.3, 0.05])
    for top_p, kept in ((0.4, [1]), (0.6, [1, 3]), (0.79, [1, 3]), (0.85, [0, 1, 3])):
        found = target_probs(probs_V.log(), SamplingSettings(1.0, top_p))
        assert found.nonzero()[:, 0].tolist() == kept
        torch.testing.assert_close(found[kept], probs_V[kept] / probs_V[kept].sum())


def test_values_that_float32_has_not_leave_the_likeliest_token() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    probs = target_probs(logits, SamplingSettings(temperature=1, top_p=1e-320))
    assert probs.tolist() == [[0, 1, 0]]
    assert SamplingSettings(temperature=1e-320).greedy


def test_half_precision_logits_become_float32() -> None:
    found = target_probs(torch.randn(300).bfloat16(), SamplingSettings(0.5))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(), torch.tensor(1.0))


def test_greedy_is_temperature_zero() -> None:
    assert SamplingSettings().greedy and SamplingSettings(0.0, 0.5).greedy
    assert not SamplingSettings(0.01).greedy


def test_draws_follow_the_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    weights_V = torch.tensor([0.0, 1.0, 3.0])  # not normalized
    drawn = torch.tensor([draw(weights_V, generator) for _ in range(2000)])
    shares = torch.bincount(drawn, minlength=3) / 2000
    assert shares[0] == 0
    # 0.75 ± 4 standard deviations of 2000 draws
    assert abs(float(shares[2]) - 0.75) < 4 * (0.75 * 0.25 / 2000) ** 0.5


def test_a_token_of_no_probability_is_never_picked() -> None:
    weights_BV = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).expand(5, -1)
    almost_one = 1 - 2.0**-53
    randoms_B = torch.tensor([0.0, 0.4999999, 0.5, 0.9999999, almost_one], dtype=torch.float64)
    assert pick(weights_BV, randoms_B).tolist() == [1, 1, 3, 3, 3]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"temperature": -1.0}, r"temperature=-1.0 is out of range; give 0 \(greedy\) or more"),
        ({"temperature": math.nan}, "temperature=nan is out of range"),
        ({"top_p": 0.0}, "top_p=0.0 is out of range; give more than 0, and at most 1"),
        ({"top_k": -1}, "top_k=-1 is out of range; give 0 "),
        ({"min_p": 1.5}, "min_p=1.5 is out of range; give 0 "),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 is out of range; give more than 0"),
        ({"presence_penalty": 2.5}, "presence_penalty=2.5 is out of range; give -2 to 2"),
        ({"frequency_penalty": -3.0}, "frequency_penalty=-3.0 is out of range; give -2 to 2"),
        ({"logit_bias": {-1: 0.5}}, r"logit_bias=\{-1: 0.5\} is out of range; give token ids"),
        ({"logit_bias": {5: math.nan}}, r"logit_bias=\{5: nan\} is out of range"),
        ({"logprobs": -1}, "logprobs=-1 is out of range; give 0 or more"),
    ],
)
def test_what_is_out_of_range_is_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        SamplingSettings(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (SamplingSettings(logit_bias={8: 1.0}), "names token 8, but the target has 8 tokens"),
        (SamplingSettings(logit_bias=dict.fromkeys(range(8), -math.inf)), "forbids every token"),
        (SamplingSettings(logprobs=9), "logprobs=9 exceeds the target's 8 tokens"),
    ],
)
def test_what_the_vocabulary_does_not_have_is_refused(
    settings: SamplingSettings, said: str
) -> None:
    settings.check_vocabulary(9)
    with pytest.raises(InputError, match=said):
        settings.check_vocabulary(8)


def test_a_decoders_defaults_are_those_of_its_config() -> None:
    assert SamplingSettings.of(DecodeConfig()) == SamplingSettings()
    config = DecodeConfig(
        temperature=0.5,
        top_p=0.9,
        sample_top_k=7,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
    )
    assert SamplingSettings.of(config) == SamplingSettings(0.5, 0.9, 7, 0.1, 1.1, 0.2, 0.3)
