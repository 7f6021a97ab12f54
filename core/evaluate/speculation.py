"""What speculation brings: accepted length, speedup and losslessness, prompt by prompt.

All ways of decoding answer a prompt one after the other before the next prompt comes, in an order
that changes with each prompt, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from core.decode.engine import SpeculativeDecoder
from core.decode.sampling import SamplingSettings
from core.decode.tree import TreePlan
from core.models.target import Target

NEAR_TIE = 1e-4
REPETITION_NGRAM = 4
ResultKey = tuple[float, str]
BASELINE = "autoregressive"
HF_GENERATE = "hf_generate"
HF_LOOKUP = "hf_prompt_lookup"


@dataclass(frozen=True)
class Draw:
    """How an answer's tokens are chosen.

    Attributes:
        seed: of what is drawn. For a seed, Aerie's text is the same whatever trees are verified,
            so that answers can be compared at any temperature.
    """

    temperature: float = 0.0
    seed: int = 0


GREEDY = Draw()


@dataclass(frozen=True)
class Answer:
    """One way's answer to one prompt.

    Attributes:
        way: a name of `core.evaluate.ways`.
        token_ids: generated tokens.
        seconds: of the whole generation, prompt included; None where others used the device too.
        rounds: target passes after the prompt's; 0 where they are not counted.
        accepted: tokens committed by each of those passes, bonus token included.
        depths: for each such pass, drafted tokens that verification accepted (uncut).
        tree_size: nodes a pass, on average; it may be up to a policy, or to what can be copied.
    """

    way: str
    token_ids: tuple[int, ...]
    seconds: float | None
    rounds: int = 0
    accepted: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    tree_size: float = 1.0


@dataclass(frozen=True)
class Difference:
    """Where an answer first leaves the baseline's.

    Attributes:
        position: index of the first different token.
        gap: difference of the target's own two largest logits there.
        steps: the same in steps between neighbouring values of the target's dtype at that size.
        sampled: the token was drawn, and a gap says nothing about how close the draw was.
    """

    position: int
    gap: float
    steps: float
    sampled: bool = False

    @property
    def near_tie(self) -> bool:
        """Whether rounding alone explains it."""
        return self.gap < NEAR_TIE and not self.sampled


@dataclass
class PromptResult:
    """All answers to one turn of a prompt; a line of `outputs.jsonl`.

    Attributes:
        text: the baseline's.
        temperature: of all answers.
        answers: by way, one a repeat.
        differences: ways that left the baseline's tokens in any repeat, and where first.
    """

    id: str
    task: str
    prompt_tokens: int
    text: str
    answers: dict[str, tuple[Answer, ...]] = field(default_factory=dict)
    differences: dict[str, Difference] = field(default_factory=dict)
    category: str | None = None
    temperature: float = 0.0

    @property
    def key(self) -> ResultKey:
        """What tells it from the others of an evaluation."""
        return self.temperature, self.id

    @property
    def timed(self) -> bool:
        """Whether its seconds count."""
        return all(one.seconds is not None for found in self.answers.values() for one in found)

    def untimed(self) -> PromptResult:
        """The same without seconds."""
        answers = {
            way: tuple(replace(one, seconds=None) for one in found)
            for way, found in self.answers.items()
        }
        return replace(self, answers=answers)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PromptResult:
        """The inverse of `as_dict`."""
        answers = {way: tuple(map(_answer, found)) for way, found in values["answers"].items()}
        differences = {way: Difference(**d) for way, d in values["differences"].items()}
        return cls(**{**values, "answers": answers, "differences": differences})


def _answer(values: dict[str, Any]) -> Answer:
    """JSON knows lists alone; answers hold tuples."""
    immutable: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
    return Answer(**immutable)


def decode(
    decoder: SpeculativeDecoder,
    way: str,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    plan: TreePlan | None,
    draw: Draw = GREEDY,
) -> Answer:
    """Answer a prompt with Aerie's decoder; without a plan, with the tree that it chooses."""
    started = time.perf_counter()
    rounds = list(
        decoder.generate(
            prompt_ids,
            max_new_tokens=max_new_tokens,
            temperature=draw.temperature,
            seed=draw.seed,
            plan=plan,
        )
    )
    seconds = time.perf_counter() - started
    after_prompt = [done for done in rounds if done.tree_size]
    sizes = [done.tree_size for done in after_prompt]
    return Answer(
        way=way,
        token_ids=tuple(token for done in rounds for token in done.tokens),
        seconds=seconds,
        rounds=len(after_prompt),
        accepted=tuple(len(done.tokens) for done in after_prompt),
        depths=tuple(len(done.ranks) for done in after_prompt),
        tree_size=statistics.fmean(sizes) if sizes else 1.0,
    )


def hf_generate(
    target: Target,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    lookup_tokens: int = 0,
    settings: SamplingSettings | None = None,
    seed: int = 0,
) -> Answer:
    """Answer a prompt with HF `generate`, with its prompt lookup where that is asked for.

    Args:
        target: whose model object generates.
        prompt_ids: at least one token.
        max_new_tokens: exact upper limit.
        lookup_tokens: copied at most in a pass, by `prompt_lookup_num_tokens`; 0 copies nothing.
        settings: temperature, top-p, top-k, min-p; None is greedy.
        seed: of torch's random numbers; HF's text is not Aerie's for the same one.
    """
    ids_1T = torch.tensor([list(prompt_ids)], device=target.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if settings is not None and settings.temperature:
        torch.manual_seed(seed)
        sampling = {
            "do_sample": True,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "min_p": settings.min_p or None,
        }
    started = time.perf_counter()
    with torch.inference_mode():
        output_1T = target.model.generate(
            ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(target.eos_token_ids),
            pad_token_id=min(target.eos_token_ids),
            prompt_lookup_num_tokens=lookup_tokens or None,
            **sampling,
        )
    seconds = time.perf_counter() - started
    way = HF_LOOKUP if lookup_tokens else HF_GENERATE
    return Answer(way, tuple(output_1T[0, len(prompt_ids) :].tolist()), seconds)


def find_difference(
    target: Target,
    prompt_ids: Sequence[int],
    wanted: Sequence[int],
    got: Sequence[int],
    *,
    sampled: bool = False,
) -> Difference | None:
    """Compare an answer's tokens with the baseline's; None where they are identical."""
    if list(got) == list(wanted):
        return None
    same = 0
    while same < min(len(got), len(wanted)) and got[same] == wanted[same]:
        same += 1
    ids_1T = torch.tensor([[*prompt_ids, *wanted[:same]]])
    logits_V = target.logits(target.features(ids_1T)[0, -1:])[0].float()
    first, second = logits_V.topk(2).values.tolist()
    step = torch.finfo(target.dtype).eps * 2.0 ** math.floor(math.log2(max(abs(first), 1e-30)))
    return Difference(same, first - second, (first - second) / step, sampled)


def repetition_rate(token_ids: Sequence[int]) -> float:
    """Share of 4-grams that occurred before in the same answer, 0..1.

    Greedy text of small models loops, and loops are easy to draft: an accepted length means
    little without this number beside it.
    """
    grams = [
        tuple(token_ids[i : i + REPETITION_NGRAM])
        for i in range(len(token_ids) - REPETITION_NGRAM + 1)
    ]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
