from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from core.decode.sampling import SamplingSettings, draw, target_probs


@pytest.mark.parametrize("temperature", [0.2, 0.7, 1.0, 1.8])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999, 1.0])
def test_the_distribution_is_that_of_hf_generate(temperature: float, top_p: float) -> None:
    logits_BV = 4 * torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)])
    wanted = warpers(torch.zeros(20, 1, dtype=torch.long), logits_BV.clone()).softmax(-1)
    found = target_probs(logits_BV, SamplingSettings(temperature, top_p))
    assert torch.equal(found > 0, wanted > 0)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_the_nucleus_is_the_smallest_that_reaches_top_p() -> None:
    probs_V = torch.tensor([0.1, 0.5, 0.05, 0.3, 0.05])
    for top_p, kept in ((0.4, [1]), (0.6, [1, 3]), (0.79, [1, 3]), (0.85, [0, 1, 3])):
        found = target_probs(probs_V.log(), SamplingSettings(1.0, top_p))
        assert found.nonzero()[:, 0].tolist() == kept
        torch.testing.assert_close(found[kept], probs_V[kept] / probs_V[kept].sum())


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
