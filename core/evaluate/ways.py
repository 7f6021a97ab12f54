"""The ways of decoding that an evaluation compares, by name.

`autoregressive` is the baseline, `chosen` the configured tree. The others say what becomes of it
with another tree, without what is copied, with that alone, with a head that has learnt nothing,
in HF's hands, or in another engine's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch

from core.config import Config, EvalConfig
from core.decode.engine import SpeculativeDecoder
from core.decode.load import LoadedDecoder, untrained_head
from core.decode.sampling import SamplingSettings
from core.decode.tree import PLAIN, TreePlan
from core.evaluate.peers import PEERS, start_peers
from core.evaluate.speculation import (
    BASELINE,
    GREEDY,
    HF_GENERATE,
    HF_LOOKUP,
    Answer,
    Draw,
    decode,
    hf_generate,
)
from core.models.packed import PackedLinear
from core.models.target import Target, load_target

T = TypeVar("T")
CHOSEN = "chosen"
WITHOUT_COPIES = "without_copies"
COPIES_ALONE = "copies_alone"
# Not Aerie's: their text is not Aerie's to answer for.
FOREIGN = (HF_GENERATE, HF_LOOKUP, *PEERS)


@dataclass(frozen=True)
class DecoderWay:
    """A decoder, and the tree of its rounds.

    Attributes:
        plan: None leaves it to the decoder, and to its policy where it has one.
        prompts: how many it answers, the first ones; None for all.
    """

    name: str
    decoder: SpeculativeDecoder
    plan: TreePlan | None
    prompts: int | None = None


def tree_way(total_tokens: int, depth: int | None = None) -> str:
    """Name of the way that decodes with a fixed tree size, of the configured depth or another."""
    return f"tree_{total_tokens}" + ("" if depth is None else f"_depth_{depth}")


def untrained_way(total_tokens: int) -> str:
    """Name of the way that decodes so with an untrained head."""
    return f"untrained_{total_tokens}"


def rotated(ways: Sequence[T], turn: int) -> list[T]:
    """All of them, beginning with another one each turn."""
    start = turn % len(ways)
    return [*ways[start:], *ways[:start]]


def fixed_plans(config: Config) -> dict[str, TreePlan]:
    """The fixed settings that are measured, by the names of their ways."""
    top_k = config.decode.top_k
    depths: Sequence[int | None] = config.eval.fixed_depths or (None,)
    plans = {}
    for size in config.eval.fixed_total_tokens:
        for depth in depths:
            own = config.decode.depth if depth is None else depth
            plans[tree_way(size, depth)] = TreePlan(size, own, top_k) if size > 1 else PLAIN
    return plans


def most_tokens(plan: TreePlan) -> int:
    """Nodes that its top-k and depth can fill, the root included."""
    return 1 + plan.top_k + plan.depth * plan.top_k**2


class Ways:
    """All ways of one evaluation; they share one target.

    Attributes:
        fixed: the fixed settings among them.
        batched: those that are measured with several requests at a time.
    """

    def __init__(self, config: Config, loaded: LoadedDecoder, num_threads: int | None) -> None:
        """Set up a decoder for each way that needs one of its own.

        Args:
            config: sections target, decode, eval.
            loaded: decodes the chosen tree.
            num_threads: torch threads of this process on CPU.
        """
        self.settings: EvalConfig = config.eval
        self.sampling = SamplingSettings.of(config.decode)
        decoder = loaded.decoder
        self.fixed = _fixed(config, decoder)
        self.aeries = [
            DecoderWay(BASELINE, decoder, PLAIN),
            DecoderWay(CHOSEN, decoder, None),
            *_with_and_without_copies(config, decoder),
            *self.fixed,
            *_untrained(config, decoder),
        ]
        self.batched = [*self.aeries[:2], *self.fixed]
        self.outside = None
        if self.settings.hf_generate_prompts:
            self.outside = _outside(config, decoder.target, num_threads)
        self.peers = start_peers(config, decoder.target, num_threads or torch.get_num_threads())

    def of(
        self,
        prompt_ids: Sequence[int],
        number: int,
        max_new_tokens: int,
        draw: Draw = GREEDY,
    ) -> dict[str, Callable[[], Answer]]:
        """What answers a prompt, by name, the baseline first.

        Args:
            prompt_ids: the prompt.
            number: counts prompts from 0; some ways answer the first ones alone.
            max_new_tokens: limit of all.
            draw: how tokens are chosen.
        """
        ways: dict[str, Callable[[], Answer]] = {
            way.name: partial(
                decode, way.decoder, way.name, prompt_ids, max_new_tokens, way.plan, draw
            )
            for way in self.aeries
            if way.prompts is None or number < way.prompts
        }
        if self.outside is not None and number < self.settings.hf_generate_prompts:
            hf = partial(
                hf_generate,
                self.outside,
                prompt_ids,
                max_new_tokens,
                settings=replace(self.sampling, temperature=draw.temperature),
                seed=draw.seed,
            )
            ways[HF_GENERATE] = hf
            if self.settings.hf_lookup_tokens:
                ways[HF_LOOKUP] = partial(hf, lookup_tokens=self.settings.hf_lookup_tokens)
        if not draw.temperature:
            # Above it, what is drawn is each engine's own, and of another length.
            for peer in self.peers:
                ways[peer.name] = partial(peer.answer, prompt_ids, max_new_tokens)
        return ways

    def plans(self) -> set[TreePlan]:
        """All trees that need room beside prompt and answer."""
        return {way.plan or way.decoder.plan for way in self.aeries}


def _fixed(config: Config, decoder: SpeculativeDecoder) -> list[DecoderWay]:
    if decoder.policy is not None:
        # A policy learns from every tree that its decoder verifies: not from these, whose prompts
        # are those that it is measured on.
        decoder = SpeculativeDecoder(decoder.target, decoder.head, config.decode)
    return [DecoderWay(name, decoder, plan) for name, plan in fixed_plans(config).items()]


def _with_and_without_copies(config: Config, decoder: SpeculativeDecoder) -> list[DecoderWay]:
    """What merging brings is told from the tree without copies, and from copies without a head."""
    if not config.decode.ngram_match or decoder.head is None:
        return []
    target, size = decoder.target, config.eval.ngram_total_tokens
    without = SpeculativeDecoder(
        target, decoder.head, config.replace(decode={"ngram_match": 0}).decode
    )
    without.plan = decoder.plan
    # It begins with what was measured, and learns for itself.
    without.policy = copy.deepcopy(decoder.policy)
    alone = SpeculativeDecoder(target, None, config.replace(decode={"total_tokens": size}).decode)
    return [
        DecoderWay(WITHOUT_COPIES, without, None),
        DecoderWay(COPIES_ALONE, alone, None),
    ]


def _untrained(config: Config, decoder: SpeculativeDecoder) -> list[DecoderWay]:
    if decoder.head is None or not config.eval.untrained_prompts:
        return []
    head = untrained_head(config, decoder.target, decoder.head)
    other = SpeculativeDecoder(
        decoder.target, head, config.replace(decode={"ngram_match": 0}).decode
    )
    return [
        DecoderWay(
            untrained_way(size), other, other.plan_of(size), prompts=config.eval.untrained_prompts
        )
        for size in config.eval.fixed_total_tokens
        if size > 1
    ]


def _outside(config: Config, target: Target, num_threads: int | None) -> Target:
    """What HF generates with: as transformers loads it, or the model that Aerie decodes with."""
    packed = any(isinstance(module, PackedLinear) for module in target.model.modules())
    if config.eval.hf_model == "packed" or not packed:
        return target
    return load_target(config.replace(target={"pack_linear": False}).target, num_threads)
