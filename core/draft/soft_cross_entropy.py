"""Cross-entropy to a whole distribution, without keeping the logits.

A head's logits are by far the largest tensors of its training: supervised positions times
vocabulary. Here a few rows at a time go through output layer, softmax and the gradient of both
while they are in the processor's cache; what stays is the gradient of the rows' hidden states.
Shapes: M supervised positions, H hidden, W draft vocabulary, C rows of a chunk.
Source: the idea of fused linear cross-entropy (Liger Kernel, Hsu et al. 2024), for soft targets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK_NUMBERS = 2**19
"""Logits of a chunk: 2 MiB in float32, which fits a core's second-level cache."""

Targets = Callable[[slice], tuple[Tensor, Tensor]]
"""Of a run of rows: probabilities [C, W] float32, and the draft id [C] whose rank is wanted (-1 for
one outside of the draft vocabulary)."""


def soft_cross_entropy(
    hidden_MH: Tensor, weight_WH: Tensor, targets: Targets, weights_M: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum over rows of weight · cross-entropy to the target's probabilities.

    Args:
        hidden_MH: [M, H].
        weight_WH: [W, H] of the output layer; it gets a gradient if it wants one.
        targets: see `Targets`; asked once for every run of rows.
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
        # Under autocast the weight is still float32.
        cast_WH = weight_WH.to(hidden_MH.dtype)
        total = hidden_MH.new_zeros((), dtype=torch.float32)
        rank_M = torch.full((rows,), size, dtype=torch.int64, device=hidden_MH.device)
        hidden_gradient = torch.empty_like(hidden_MH) if wants_hidden else None
        weight_gradient = torch.zeros_like(weight_WH, dtype=torch.float32) if wants_weight else None
        chunk = max(1, CHUNK_NUMBERS // size)
        for start in range(0, rows, chunk):
            part = slice(start, min(start + chunk, rows))
            logits_CW = (hidden_MH[part] @ cast_WH.T).float()
            probs_CW, best_C = targets(part)
            inside_C = best_C >= 0
            best_logit_C = logits_CW.gather(1, best_C.clamp(min=0)[:, None])
            rank_C = (logits_CW > best_logit_C).sum(-1)
            rank_M[part] = torch.where(inside_C, rank_C, size)
            most_C = logits_CW.amax(-1, keepdim=True)
            weighted_C = (probs_CW * logits_CW).sum(-1)
            exp_CW = logits_CW.sub_(most_C).exp_()
            sum_C = exp_CW.sum(-1, keepdim=True)
            loss_C = sum_C.log()[:, 0] + most_C[:, 0] - weighted_C
            total += loss_C.sum() if weights_M is None else (loss_C * weights_M[part]).sum()
            if wants_hidden or wants_weight:
                gradient_CW = exp_CW.div_(sum_C).sub_(probs_CW)
                if weights_M is not None:
                    gradient_CW *= weights_M[part, None]
                low_CW = gradient_CW.to(hidden_MH.dtype)
                if hidden_gradient is not None:
                    hidden_gradient[part] = low_CW @ cast_WH
                if weight_gradient is not None:
                    weight_gradient += low_CW.T @ hidden_MH[part]
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
