"""Cross-entropy to a whole distribution, without keeping the logits.

A head's logits are by far the largest tensors of its training: supervised positions times
vocabulary. Here a chunk of rows at a time goes through the output layer, and of that a few rows at
a time through both softmaxes and the gradient, while they are in the processor's cache; what stays
is the gradient of the rows' hidden states.
Shapes: M supervised positions, H hidden, W draft vocabulary, C rows of a chunk, R rows of a run
within it.
Source: the idea of fused linear cross-entropy (Liger Kernel, Hsu et al. 2024), for soft targets.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

CHUNK_ROWS = 128
"""Rows of a product. Fewer stay in nearer caches, but the output layer's weight is read and packed
for each product: with 10 rows a step of 49,152 tokens' vocabulary took four times as long."""
RUN_VALUES = 2**18
"""Logits that go through all that is done to single values before the next ones do, on CPU: 1 MB of
float32. With a whole chunk at a time, each of fifteen passes would read and write main memory."""

Targets = Callable[[slice, Tensor], Tensor | None]
"""Writes the target's logits of a run of rows into a tensor [C, W]. Returns the draft id [C] whose
rank is wanted (-1 for one outside of the draft vocabulary), or None for the likeliest."""


def product_dtype(like: Tensor) -> torch.dtype:
    """What products with a vocabulary's rows are computed in, of tensors like this one.

    Its own dtype, but for bfloat16 on processors that are slower at it than at float32, which is
    exacter too.
    """
    if like.device.type != "cpu" or like.dtype != torch.bfloat16:
        return like.dtype
    return torch.bfloat16 if multiplies_bfloat16_faster() else torch.float32


@cache
def multiplies_bfloat16_faster() -> bool:
    """Whether this processor is, measured once: no flag of a processor's tells.

    Of two with the same instructions (AVX-512 BF16, no AMX) one multiplied at half of float32's
    speed and one at four times it. Differences are that large, and the best of several counts, so
    that a run that goes on decides the same on a busy machine.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        rows, weight = torch.ones(CHUNK_ROWS, 512, dtype=dtype), torch.ones(4096, 512, dtype=dtype)
        times = []
        for _ in range(6):
            start = time.perf_counter()
            torch.mm(rows, weight.T)
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] < seconds[torch.float32]


def soft_cross_entropy(
    hidden_MH: Tensor, weight_WH: Tensor, targets: Targets, weights_M: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum over rows of weight · cross-entropy to the target's softmax over the draft vocabulary.

    Args:
        hidden_MH: [M, H].
        weight_WH: [W, H] of the output layer; it gets a gradient if it wants one.
        targets: see `Targets`; asked once for every chunk of rows.
        weights_M: [M] float32 of the rows; None for 1 each. No gradient.
    Returns:
        The sum, float32, differentiable once; and rank_M int64: how many tokens the head finds
        likelier than the wanted one, W where that is outside of the draft vocabulary.
    """
    result: tuple[Tensor, Tensor] = _SoftCrossEntropy.apply(
        hidden_MH, weight_WH, targets, weights_M
    )
    return result


class _SoftCrossEntropy(torch.autograd.Function):
    """The gradient is computed with the loss, since its backward pass only scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MH: Tensor,
        weight_WH: Tensor,
        targets: Targets,
        weights_M: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        rows, size = len(hidden_MH), len(weight_WH)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        dtype = product_dtype(hidden_MH)
        cast_MH, cast_WH = hidden_MH.to(dtype), weight_WH.to(dtype)
        total = hidden_MH.new_zeros((), dtype=torch.float32)
        rank_M = torch.empty(rows, dtype=torch.int64, device=hidden_MH.device)
        hidden_gradient = torch.empty_like(hidden_MH) if wants_hidden else None
        weight_gradient = torch.zeros_like(weight_WH, dtype=torch.float32) if wants_weight else None
        # Large temporaries cost more than what is computed in them.
        chunk = min(rows, CHUNK_ROWS)
        kept_CW, kept_target_CW = cast_WH.new_empty(2, chunk, size)
        runs = _Runs(chunk, kept_CW)
        # The dtype is chosen here; the weight under autocast is still float32.
        with torch.autocast(hidden_MH.device.type, enabled=False):
            for start in range(0, rows, CHUNK_ROWS):
                part = slice(start, min(start + CHUNK_ROWS, rows))
                count = part.stop - start
                logits_CW, target_CW = kept_CW[:count], kept_target_CW[:count]
                torch.mm(cast_MH[part], cast_WH.T, out=logits_CW)
                best_C = targets(part, target_CW)
                weights_C = None if weights_M is None else weights_M[part]
                loss, rank_M[part] = runs.through(logits_CW, target_CW, best_C, weights_C)
                total += loss
                if hidden_gradient is not None:
                    hidden_gradient[part] = logits_CW @ cast_WH
                if weight_gradient is not None:
                    weight_gradient += logits_CW.T @ cast_MH[part]
        ctx.gradients = hidden_gradient, weight_gradient
        ctx.weight_dtype = weight_WH.dtype
        ctx.mark_non_differentiable(rank_M)
        return total, rank_M

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight = ctx.gradients
        return (
            None if hidden is None else (hidden * outer[0]).to(hidden.dtype),
            None if weight is None else (weight * outer[0]).to(ctx.weight_dtype),
            None,
            None,
        )


class _Runs:
    """What is done to single values, for a few rows at a time, in float32."""

    def __init__(self, chunk: int, like_CW: Tensor) -> None:
        size = max(1, like_CW.shape[1])
        on_cpu = like_CW.device.type == "cpu"
        self.rows = max(1, min(chunk, RUN_VALUES // size) if on_cpu else chunk)
        shape = (self.rows, size)
        self.is_wide = like_CW.dtype == torch.float32
        self.scratch_RW = like_CW.new_empty(shape, dtype=torch.float32)
        # Where the chunk's own memory is not float32.
        if not self.is_wide:
            self.wide_RW = torch.empty_like(self.scratch_RW)
            self.wide_target_RW = torch.empty_like(self.scratch_RW)

    def through(
        self, logits_CW: Tensor, target_CW: Tensor, best_C: Tensor | None, weights_C: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The loss of a chunk, and ranks [C]; the head's logits become their gradient."""
        total = logits_CW.new_zeros((), dtype=torch.float32)
        ranks = []
        for start in range(0, len(logits_CW), self.rows):
            run = slice(start, start + self.rows)
            logits_RW, target_RW = logits_CW[run], target_CW[run]
            count = len(logits_RW)
            if not self.is_wide:
                logits_RW = self.wide_RW[:count].copy_(logits_RW)
                target_RW = self.wide_target_RW[:count].copy_(target_RW)
            best_R = None if best_C is None else best_C[run]
            loss_R, rank_R = _gradient(logits_RW, target_RW, best_R, self.scratch_RW[:count])
            if weights_C is not None:
                loss_R = loss_R * weights_C[run]
                logits_RW *= weights_C[run, None]
            if not self.is_wide:
                logits_CW[run] = logits_RW
            total += loss_R.sum()
            ranks.append(rank_R)
        return total, torch.cat(ranks)


def _gradient(
    logits_RW: Tensor, target_RW: Tensor, best_R: Tensor | None, scratch_RW: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses [R] and ranks [R]; turns logits into their gradient, the target's into garbage."""
    if best_R is None:
        most_R1, best_R1 = target_RW.max(-1, keepdim=True)
    else:
        most_R1, best_R1 = target_RW.amax(-1, keepdim=True), best_R[:, None]
    probs_RW = target_RW.sub_(most_R1).exp_()
    probs_RW.div_(probs_RW.sum(-1, keepdim=True))
    # As float32: sums of bool take ten times as long on CPU.
    best_logit_R1 = logits_RW.gather(1, best_R1.clamp(min=0))
    rank_R = torch.gt(logits_RW, best_logit_R1, out=scratch_RW).sum(-1).long()
    weighted_R = torch.mul(probs_RW, logits_RW, out=scratch_RW).sum(-1)
    most_R1 = logits_RW.amax(-1, keepdim=True)
    exp_RW = logits_RW.sub_(most_R1).exp_()
    sum_R1 = exp_RW.sum(-1, keepdim=True)
    exp_RW.div_(sum_R1).sub_(probs_RW)
    loss_R = (sum_R1.log() + most_R1)[:, 0] - weighted_R
    return loss_R, torch.where(best_R1[:, 0] >= 0, rank_R, logits_RW.shape[1])
