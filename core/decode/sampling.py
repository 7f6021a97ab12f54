"""From logits to the distribution that a request asks for.

Shapes: B rows, V target vocabulary, K likeliest tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core.config import DecodeConfig
from core.errors import InputError

# The likeliest tokens that are looked through first for a nucleus; most distributions need no more.
FIRST_CANDIDATES = 128
LARGEST_PENALTY = 2.0
# Below, the likeliest token is taken, as in vLLM: logits divided by less overflow.
LEAST_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class SamplingSettings:
    """What one request asks for.

    They take effect in this order, which is HF's and vLLM's: bias; repetition, then frequency and
    presence penalty; temperature; top-k; top-p; min-p (vLLM has min-p before top-k, which differs
    where both cut). Greedy decoding takes the argmax behind the penalties.

    Attributes:
        temperature: 0, and what is less than 1e-5, is greedy.
        top_p: the nucleus, a share of the probability; 1 takes all tokens.
        top_k: likeliest tokens that are kept; 0 takes all.
        min_p: least probability that is kept, as a share of the likeliest token's; 0 takes all.
        repetition_penalty: logits of tokens in prompt or output are divided by it where
            positive, else multiplied; 1 leaves them.
        presence_penalty: taken off the logit of each token in the output, -2 to 2.
        frequency_penalty: taken off as often as the output has the token, -2 to 2.
        logit_bias: added to these tokens' logits; minus infinity forbids one.
        logprobs: likeliest tokens whose log-probabilities are reported beside the chosen one's;
            None reports nothing.
    Raises:
        InputError: a value out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    # Mappings have no hash; equal settings still have equal ones.
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    logprobs: int | None = None

    def __post_init__(self) -> None:
        low, high = -LARGEST_PENALTY, LARGEST_PENALTY
        self._check("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more")
        self._check("top_p", 0 < self.top_p <= 1, "more than 0, and at most 1 (all tokens)")
        self._check("top_k", self.top_k >= 0, "0 (all tokens) or more")
        self._check("min_p", 0 <= self.min_p <= 1, "0 (all tokens) to 1")
        self._check(
            "repetition_penalty",
            0 < self.repetition_penalty < math.inf,
            "more than 0; 1 is none, and more than 1 discourages",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            self._check(name, low <= getattr(self, name) <= high, f"{low:g} to {high:g}")
        self._check("logprobs", self.logprobs is None or self.logprobs >= 0, "0 or more")
        for token, bias in self.logit_bias.items():
            if token < 0 or not bias < math.inf:
                raise InputError(
                    f"logit_bias={{{token}: {bias}}} is out of range; give token ids from 0 on, "
                    "and a number (minus infinity forbids a token)"
                )

    def _check(self, name: str, right: bool, wanted: str) -> None:
        if not right:
            raise InputError(f"{name}={getattr(self, name)} is out of range; give {wanted}")

    @classmethod
    def of(cls, config: DecodeConfig) -> SamplingSettings:
        """The defaults of a decoder."""
        return cls(
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.sample_top_k,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
            presence_penalty=config.presence_penalty,
            frequency_penalty=config.frequency_penalty,
        )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < LEAST_TEMPERATURE

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse what a target of so many tokens cannot do.

        Raises:
            InputError: a bias for a token that there is not, or for all of them that forbids.
        """
        most = max(self.logit_bias, default=0)
        if most >= vocab_size:
            raise InputError(
                f"logit_bias names token {most}, but the target has {vocab_size} tokens; give ids "
                f"from 0 to {vocab_size - 1}"
            )
        if sum(bias == -math.inf for bias in self.logit_bias.values()) == vocab_size:
            raise InputError("logit_bias forbids every token; leave at least one")
        if self.logprobs is not None and self.logprobs > vocab_size:
            raise InputError(
                f"logprobs={self.logprobs} exceeds the target's {vocab_size} tokens; lower it"
            )


def target_probs(logits_BV: Tensor, settings: SamplingSettings) -> Tensor:
    """The processed distribution, float32 [..., V]; temperature must be above 0.

    Speculation is lossless with respect to this distribution, of logits behind the penalties.
    """
    probs_BV = (logits_BV.float() / settings.temperature).softmax(-1)
    size = probs_BV.shape[-1]
    cuts = 0 < settings.top_k < size
    if cuts or settings.top_p < 1:
        count = settings.top_k if cuts else size
        kept_BK, order_BK = _likeliest(probs_BV, count, settings.top_p)
        probs_BV = torch.zeros_like(probs_BV).scatter(-1, order_BK, kept_BK)
    if settings.min_p > 0:
        least_B1 = settings.min_p * probs_BV.amax(-1, keepdim=True)
        probs_BV = probs_BV.masked_fill(probs_BV < least_B1, 0)
    return probs_BV / probs_BV.sum(-1, keepdim=True)


def _likeliest(probs_BV: Tensor, most: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities [..., K] of the `most` likeliest tokens, 0 outside of their nucleus.

    Sorting the whole vocabulary would take longer than all the rest, so a nucleus is looked for
    among ever more candidates.
    """
    size = probs_BV.shape[-1]
    count = most if most < size or top_p >= 1 else min(size, FIRST_CANDIDATES)
    probs_BK, order_BK = probs_BV.topk(count, dim=-1)
    while count < most and bool((probs_BK.sum(-1) < top_p).any()):
        count = min(most, 8 * count)
        probs_BK, order_BK = probs_BV.topk(count, dim=-1)
    if top_p >= 1:
        return probs_BK, order_BK
    # top-p is a share of what top-k has left.
    wanted_B1 = top_p * (probs_BK.sum(-1, keepdim=True) if most < size else 1.0)
    # A token stays if the tokens before it have not yet reached top_p; the first always stays.
    before_BK = probs_BK.cumsum(-1) - probs_BK
    return probs_BK.masked_fill((before_BK > 0) & (before_BK >= wanted_B1), 0), order_BK


def pick(probs_BV: Tensor, randoms_B: Tensor) -> Tensor:
    """A token for each row of probabilities, int64 [B].

    Args:
        probs_BV: [B, V], need not be normalized; a token of probability 0 is never picked.
        randoms_B: float64 [B], uniform on [0, 1): equal numbers pick equal tokens.
    """
    sums_BV = probs_BV.double().cumsum(-1)
    total_B1 = sums_BV[:, -1:]
    # Rounding must not put the point on the total: behind it there is no token.
    below_B1 = total_B1.nextafter(torch.zeros_like(total_B1))
    points_B1 = torch.minimum(randoms_B[:, None] * total_B1, below_B1)
    # The first token whose sum exceeds the point.
    return torch.searchsorted(sums_BV, points_B1, right=True)[:, 0]


def draw(probs_V: Tensor, generator: torch.Generator) -> int:
    """One token from a distribution [V] that need not be normalized; takes one random number."""
    random = torch.rand(1, generator=generator, dtype=torch.float64)
    return int(pick(probs_V[None], random))
