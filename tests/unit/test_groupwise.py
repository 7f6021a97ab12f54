from __future__ import annotations

import pytest
import torch

from core.data.groupwise import GROUP, LARGEST, dequantize, num_groups, quantize


def _values(hidden: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(40, 2, hidden, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("hidden", [64, 128, 100, 32, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_value_is_off_by_more_than_half_its_scale(hidden: int, dtype: torch.dtype) -> None:
    values = _values(hidden).to(dtype)
    codes, scales = quantize(values)
    assert codes.dtype == torch.int8 and codes.shape == values.shape
    assert scales.dtype == torch.bfloat16 and scales.shape == (40, 2, num_groups(hidden))
    wide = scales.float().repeat_interleave(GROUP, dim=-1)[..., :hidden]
    off = (dequantize(codes, scales) - values.float()).abs()
    # 1e-6: the division and the product are each rounded to float32.
    assert bool((off <= wide / 2 * (1 + 1e-6) + 1e-6 * values.float().abs()).all())


def test_a_step_is_at_most_a_128th_larger_than_it_must_be() -> None:
    values = _values(128)
    codes, scales = quantize(values)
    largest = values.unflatten(-1, (-1, GROUP)).abs().amax(-1)
    assert bool((scales.float() * LARGEST >= largest).all()), "the largest would be clipped"
    assert bool((scales.float() * LARGEST <= largest * (1 + 2**-7)).all())
    assert codes.abs().max() <= LARGEST


def test_an_outlier_costs_its_own_group_alone() -> None:
    values = _values(256)
    values[..., 70] *= 500
    off = (dequantize(*quantize(values)) - values).unflatten(-1, (-1, GROUP)).norm(dim=-1)
    size = values.unflatten(-1, (-1, GROUP)).norm(dim=-1)
    others = [0, 2, 3]
    assert (off / size)[..., others].max() < 0.02
    # One scale for the whole vector, for comparison.
    step = values.abs().amax(-1, keepdim=True) / LARGEST
    whole = ((values / step).round() * step - values).unflatten(-1, (-1, GROUP)).norm(dim=-1)
    assert (whole / size)[..., others].median() > 0.3


@pytest.mark.parametrize("factor", [1e-42, 1e-30, 1e30, 0.0])
def test_tiny_huge_and_zero_groups(factor: float) -> None:
    values = _values(64) * factor
    found = dequantize(*quantize(values))
    assert bool(torch.isfinite(found).all())
    assert (found - values).abs().max() <= max(values.abs().max().item() / 200, 1e-38)


def test_it_takes_52_percent_of_float16() -> None:
    codes, scales = quantize(_values(576))
    assert codes.nbytes + scales.nbytes == pytest.approx(0.516 * codes.numel() * 2, rel=1e-3)
