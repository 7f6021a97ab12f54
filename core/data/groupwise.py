"""int8 with a scale for each group of 64 values: a feature in 52% of float16's bytes.

A scale per token fails: trained models have a few dimensions a hundred times larger than the
rest, and one scale for all would round the rest to zero. Here such a dimension costs its own group
alone.

Shapes: H hidden, G groups of H (the last may be shorter).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GROUP = 64
LARGEST = 127
# bfloat16, not float16: the states between layers reach values whose scale float16 could hold,
# but the smallest groups' would fall below its normal range and lose digits. The few digits of
# bfloat16 cost nothing, since values are divided by the scale as it is stored.
SCALE_DTYPE = torch.bfloat16
SMALLEST_SCALE = torch.finfo(SCALE_DTYPE).tiny


def num_groups(hidden_size: int) -> int:
    """G: scales of one vector."""
    return math.ceil(hidden_size / GROUP)


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric, rounded to nearest, nothing clipped.

    Args:
        values: [..., H], finite.
    Returns:
        int8 [..., H] and bfloat16 scales [..., G]. Each value is off by at most half its
        group's scale, which is at most 1/127 (and 1/128 of that) of the group's largest value.
    """
    hidden_size = values.shape[-1]
    grouped = _grouped(values.float())
    scales = _rounded_up(grouped.abs().amax(-1) / LARGEST).clamp_min(SMALLEST_SCALE)
    codes = (grouped / scales.unsqueeze(-1)).round_().to(torch.int8)
    return codes.flatten(-2)[..., :hidden_size].contiguous(), scales.to(SCALE_DTYPE)


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """float32 [..., H]: a product of 7 and 8 bits, which bfloat16 would round once more."""
    wide = scales.float().repeat_interleave(GROUP, dim=-1)
    return codes.float().mul_(wide[..., : codes.shape[-1]])


def _grouped(values: Tensor) -> Tensor:
    """[..., H] as [..., G, 64], the last group filled up with zeros."""
    missing = -values.shape[-1] % GROUP
    return torch.nn.functional.pad(values, (0, missing)).unflatten(-1, (-1, GROUP))


def _rounded_up(scales: Tensor) -> Tensor:
    """The next bfloat16 that is not smaller, still as float32: no value exceeds 127 scales.

    A positive float32 cut to its upper 16 bits is a bfloat16 rounded down.
    """
    bits = scales.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)
