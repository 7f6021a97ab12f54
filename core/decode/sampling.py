"""From logits to the distribution that a request asks for. Shapes: V target vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are chosen; temperature 0 is greedy, top_k 0 takes all tokens."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0


def target_probs(logits_V: Tensor, settings: SamplingSettings) -> Tensor:
    """The processed distribution, float32 [..., V]; temperature must be above 0.

    Speculation is lossless with respect to this distribution: temperature first, then top-k,
    then top-p, as HF `generate` orders them.
    """
    probs_V = (logits_V.float() / settings.temperature).softmax(-1)
    if 0 < settings.top_k < probs_V.shape[-1]:
        top = probs_V.topk(settings.top_k, dim=-1)
        probs_V = torch.zeros_like(probs_V).scatter(-1, top.indices, top.values)
        probs_V = probs_V / probs_V.sum(-1, keepdim=True)
    if settings.top_p >= 1:
        return probs_V
    sorted_V, order_V = probs_V.sort(dim=-1, descending=True)
    # A token stays if the tokens before it have not yet reached top_p; the first always stays.
    before_V = sorted_V.cumsum(-1) - sorted_V
    sorted_V = sorted_V.masked_fill(before_V >= settings.top_p, 0)
    kept_V = torch.zeros_like(probs_V).scatter(-1, order_V, sorted_V)
    return kept_V / kept_V.sum(-1, keepdim=True)


def draw(probs_V: Tensor, generator: torch.Generator) -> int:
    """One token from a distribution [V] that need not be normalized."""
    return int(torch.multinomial(probs_V, 1, generator=generator))
