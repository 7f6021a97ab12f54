"""What memory allows: decoding one sequence reads all weights for every token.

The bytes that a plain step moves, over the bytes a second that the device reads, bound its speed;
how near plain decoding comes to that says how much is left to win without speculation.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from core.models.packed import PackedLinear, PartLinear
from core.models.target import Target

BUFFER_BYTES = 2**29
RUNS = 5


def memory_figures(target: Target) -> dict[str, Any]:
    """Bytes of weights a plain step, bytes a second, and the tokens a second that they allow.

    A mixture's step reads some of its experts alone, which are no linear layers in transformers
    and are left out.
    """
    weights, bandwidth = weight_bytes(target.model), read_bandwidth(target.device)
    return {
        "weight_bytes_per_token": weights,
        "bytes_per_second": bandwidth,
        "tokens_per_second_limit": bandwidth / weights,
    }


def weight_bytes(model: nn.Module) -> int:
    """Of all linear layers, the output head among them; an embedding's row is next to nothing."""
    total = 0
    for module in model.modules():
        if isinstance(module, (PackedLinear, PartLinear)):
            total += module.in_features * module.out_features * module.dtype.itemsize
        elif isinstance(module, nn.Linear):
            total += module.weight.nbytes
    return total


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second of summing up a buffer far larger than any cache, on all threads."""
    buffer = torch.ones(BUFFER_BYTES // 4, device=device)
    best = float("inf")
    for _ in range(RUNS):
        started = time.perf_counter()
        # The value has to arrive, so that a GPU has finished.
        assert float(buffer.sum()) > 0
        best = min(best, time.perf_counter() - started)
    return BUFFER_BYTES / best
