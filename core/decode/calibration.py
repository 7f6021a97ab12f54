"""The short measurement behind `decode.total_tokens: auto`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from core.data.conversations import Message
from core.data.template import encode_prompt
from core.decode.batch_policy import BatchPolicy
from core.decode.costs import BatchCosts, CostModel, least_of_larger
from core.decode.drafting import top_tokens
from core.decode.engine import SpeculativeDecoder
from core.decode.forward import Piece, target_pass
from core.decode.policy import (
    PlanEstimate,
    RoundCosts,
    RoundRecord,
    candidate_plans,
    choose,
    estimate,
    median_seconds,
)
from core.decode.rows import RowCache
from core.decode.tree import DraftTree, TreePlan
from core.draft.base import DraftBeams, DraftPlace
from core.errors import ConfigError

# Of no benchmark, so that measuring on a benchmark afterwards stays honest.
QUESTIONS = (
    "Explain in a few sentences how a bicycle stays upright.",
    "Write a short Python function that counts the vowels in a string.",
    "Give me a list of five things to pack for a hike.",
    "What is the difference between a novel and a short story?",
)
NEW_TOKENS = 40
LARGEST_TREE = 60
CONTEXT_TOKENS = 256
# Tokens of passes that are timed besides those of one tree, and sequences of a timed batch.
PASS_SIZES = (96, 128)
SEQUENCES = 4
# Nodes of a narrow level, beside the widest.
NARROW = 2


@dataclass(frozen=True)
class Calibration:
    """What was measured, and the plan that it speaks for."""

    plan: TreePlan
    costs: RoundCosts
    estimates: tuple[PlanEstimate, ...]
    num_rounds: int

    def summary(self) -> dict[str, Any]:
        """Plain numbers for a report: the plan, and the best estimate of each tree size."""
        best: dict[int, PlanEstimate] = {}
        for one in self.estimates:
            best.setdefault(one.plan.total_tokens, one)
        return {
            "total_tokens": self.plan.total_tokens,
            "depth": self.plan.depth,
            "top_k": self.plan.top_k,
            "rounds_measured": self.num_rounds,
            "plain_step_ms": self.costs.verify[1] * 1e3,
            "expand_ms": self.costs.expand * 1e3,
            "by_size": {
                size: {
                    "verify_ms": self.costs.verify[size] * 1e3,
                    "depth": one.plan.depth,
                    "accepted_length": one.accepted_length,
                    "speedup": one.speedup,
                }
                for size, one in sorted(best.items())
            },
        }


def calibrate(decoder: SpeculativeDecoder) -> Calibration:
    """Measure costs and acceptance, and choose the tree of most tokens a second.

    Takes about 500 target passes. The decoder's own plan is left as it is; it is given a policy,
    which begins with what was measured, for requests that name no tree.

    Raises:
        ConfigError: the decoder has no draft head, or its context is too short to measure.
    """
    if decoder.head is None:
        raise ConfigError("decode.total_tokens=auto needs a draft head; set draft.path")
    config = decoder.config
    largest = TreePlan(min(LARGEST_TREE, config.most_tokens), config.depth, config.top_k)
    plans = candidate_plans(largest)
    prompts = [
        encode_prompt(decoder.target.tokenizer, [Message("user", question)])
        for question in QUESTIONS
    ]
    needed = max(len(prompt) for prompt in prompts) + NEW_TOKENS
    if needed > decoder.longest(largest):
        raise ConfigError(
            f"decode.max_context={decoder.max_context} or decode.cache_tokens="
            f"{config.cache_tokens} is too small for the measurement behind "
            f"decode.total_tokens=auto: {needed} tokens and a tree of {largest.total_tokens}; "
            "raise them, or set a fixed tree size"
        )
    extra = (size for size in PASS_SIZES if size <= decoder.max_context // 4)
    sizes = sorted({1, *(plan.total_tokens for plan in plans), *extra})
    measured = _time_rounds(decoder, sizes)
    # It learns from what is decoded here, whose trees are the largest.
    decoder.policy = BatchPolicy(CostModel(measured), largest)
    records = _decode(decoder, prompts, largest)
    if not records:
        decoder.policy = None
        raise ConfigError(
            "decode.total_tokens=auto cannot be measured: the target ends every calibration answer "
            "at once; set a fixed tree size"
        )
    costs = RoundCosts(
        dict(measured.verify), measured.read[1], measured.expand[most_beams(decoder)]
    )
    estimates = estimate(plans, records, costs)
    return Calibration(choose(estimates), costs, tuple(estimates), len(records))


def _decode(
    decoder: SpeculativeDecoder, prompts: Sequence[Sequence[int]], largest: TreePlan
) -> list[RoundRecord]:
    rounds = itertools.chain.from_iterable(
        decoder.generate(prompt, max_new_tokens=NEW_TOKENS, temperature=0, plan=largest)
        for prompt in prompts
    )
    return [RoundRecord(done.ranks) for done in rounds if done.tree_size]


@torch.inference_mode()
def _time_rounds(decoder: SpeculativeDecoder, sizes: Sequence[int]) -> BatchCosts:
    """Time target passes of each size and the head's two calls at a usual context length."""
    target = decoder.target
    context = min(CONTEXT_TOKENS, decoder.max_context - max(sizes) - 1)
    ids = [token % target.vocab_size for token in range(context)]
    firsts, num_rows = _stretches(SEQUENCES, context + max(sizes))
    rows = RowCache(target.model.config, num_rows, decoder.max_context)
    texts = [Piece.of_text(first, 0, ids, 1) for first in firsts]
    target_pass(target, rows, texts, decoder.feature_layers)

    def verification(size: int, sequences: int = 1) -> Callable[[], object]:
        pieces = [Piece.of_tree(first, context, _star(size)) for first in firsts[:sequences]]
        return partial(target_pass, target, rows, pieces, decoder.feature_layers)

    widest = most_beams(decoder)
    works: dict[Hashable, Callable[[], object]] = {size: verification(size) for size in sizes}
    works["apart"] = verification(1, SEQUENCES)
    for count, width in ((1, NARROW), (1, widest), (SEQUENCES, widest)):
        works["read", count], works["expand", count * width] = _drafting(decoder, ids, count, width)
    seconds = median_seconds(works)
    verify = least_of_larger({size: seconds[size] for size in sizes})
    return BatchCosts(
        verify=verify,
        each_sequence=max(0.0, (seconds["apart"] - verify[SEQUENCES]) / (SEQUENCES - 1)),
        read={count: seconds["read", count] for count in (1, SEQUENCES)},
        expand={count: seconds["expand", count] for count in (NARROW, widest, SEQUENCES * widest)},
    )


def most_beams(decoder: SpeculativeDecoder) -> int:
    """Most nodes of a tree that are expanded at once."""
    assert decoder.head is not None
    return min(decoder.config.top_k, decoder.head.vocabulary.size)


def _drafting(
    decoder: SpeculativeDecoder, ids: Sequence[int], sequences: int, width: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Reading two committed tokens each of some sequences, and expanding `width` nodes of each."""
    head, target = decoder.head, decoder.target
    assert head is not None
    context, top_k = len(ids), most_beams(decoder)
    firsts, num_rows = _stretches(sequences, context + width)
    cache = head.new_cache(num_rows)
    hidden_H = torch.zeros(1, target.hidden_size, device=target.device, dtype=target.dtype)
    features_TLH = hidden_H.expand(context, len(decoder.feature_layers), -1)
    ids_T = torch.tensor(ids, device=target.device)
    head.extend(cache, features_TLH, ids_T)
    count = 2 * sequences
    places = [DraftPlace(first, context - 2) for first in firsts]
    features_NLH, next_ids_N = features_TLH[:1].expand(count, -1, -1), ids_T[:1].expand(count)

    def read() -> None:
        head.extend_all(cache, places, (2,) * sequences, features_NLH, next_ids_N)

    beams = DraftBeams(
        places=tuple(DraftPlace(first, context) for first in firsts),
        hidden_SKH=hidden_H.expand(sequences, width, -1),
        token_ids_SK=ids_T[:width].expand(sequences, -1),
        depth=1,
        sees_SKT=torch.eye(width, dtype=torch.bool, device=target.device).expand(sequences, -1, -1),
    )

    def expand() -> None:
        top_tokens(head.step_all(cache, beams).logits_KW, top_k)

    return read, expand


def _stretches(count: int, size: int) -> tuple[list[int], int]:
    """First rows of sequences, at no common distance as after a while, and rows of them all."""
    firsts = [number * (size + number) for number in range(count)]
    return firsts, firsts[-1] + size


def _star(size: int) -> DraftTree:
    """A tree of the root and its children, for timing."""
    return DraftTree(torch.arange(size), (-1, *(0,) * (size - 1)), tuple(range(size)))
