"""One process that evaluates a decoder, prompt by prompt."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from core.config import Config
from core.data.conversations import Message
from core.data.prompts import Prompt
from core.data.template import encode_prompt
from core.decode.engine import SpeculativeDecoder
from core.decode.load import load_decoder, untrained_head
from core.decode.tree import PLAIN, TreePlan
from core.errors import InputError
from core.evaluate.speculation import (
    BASELINE,
    HF_GENERATE,
    Answer,
    PromptResult,
    decode,
    find_difference,
    hf_generate,
    tree_way,
)
from core.evaluate.summary import CHOSEN

WARM_UP_TOKENS = 8


class EvaluationSession:
    """A loaded decoder, an untrained one beside it, and the ways of decoding to compare."""

    def __init__(self, config: Config, num_threads: int | None, chosen: TreePlan | None) -> None:
        """Load, measure the tree size where it is `auto`, and warm up.

        Args:
            config: sections target, draft, decode, eval.
            num_threads: torch threads.
            chosen: the tree that an interrupted run of this evaluation had chosen.
        """
        # Every way reads the whole prompt: the second one must not find it read.
        config = config.replace(decode={"reuse_prefixes": False})
        self.config = config
        if chosen is not None:
            config = config.replace(
                decode={"total_tokens": chosen.total_tokens, "depth": chosen.depth}
            )
        loaded = load_decoder(config, num_threads)
        self.decoder = loaded.decoder
        self.calibration = loaded.calibration.summary() if loaded.calibration else None
        self.chosen = self.decoder.plan
        self.untrained = self._untrained_decoder()
        self._warm_up()

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Make sure that every prompt fits before the first is answered.

        Raises:
            InputError: one does not; the message names it.
        """
        settings = self.config.eval
        plans = {PLAIN, self.chosen, *map(self._fixed_plan, settings.fixed_total_tokens)}
        # The tree that leaves least room decides.
        plan = min(plans, key=self.decoder.longest)
        for prompt in prompts:
            turns = len(prompt.ids(settings.turns))
            # The answers in between are not known yet, but how long they may be is.
            messages = prompt.after(["…"] * (turns - 1))
            prompt_ids = encode_prompt(self.decoder.target.tokenizer, messages)
            try:
                self.decoder.check_fits(prompt_ids, settings.max_new_tokens * turns, plan)
            except InputError as error:
                raise InputError(f"prompt {prompt.id}: {error}") from error

    def answer(self, prompt: Prompt, turn: int, said: Sequence[str] = ()) -> Iterator[PromptResult]:
        """Answer one prompt in every way, turn by turn, as far as `eval.turns` goes.

        Every way answers a turn on top of the baseline's answers to those before, so that all
        have the same prompt.

        Args:
            prompt: to answer.
            turn: counts prompts from 0.
            said: the baseline's answers to the turns that are answered already.
        """
        answers = list(said)
        for name in prompt.ids(self.config.eval.turns)[len(answers) :]:
            result = self._answer_turn(prompt, name, prompt.after(answers), turn)
            yield result
            answers.append(result.text)

    def _answer_turn(
        self, prompt: Prompt, name: str, messages: Sequence[Message], turn: int
    ) -> PromptResult:
        target = self.decoder.target
        prompt_ids = encode_prompt(target.tokenizer, messages)
        ways = self._ways(prompt_ids, turn, self.config.eval.max_new_tokens)
        answers = {answer.way: answer for answer in _in_turn(ways, turn)}
        # Told in the same order for every prompt.
        answers = {way: answers[way] for way in ways}
        baseline = next(iter(answers.values()))
        result = PromptResult(
            id=name,
            task=prompt.task,
            category=prompt.category,
            prompt_tokens=len(prompt_ids),
            text=target.tokenizer.decode(baseline.token_ids, skip_special_tokens=True),
            answers=answers,
        )
        for way, answer in answers.items():
            difference = find_difference(target, prompt_ids, baseline, answer)
            if difference is not None and way != HF_GENERATE:
                result.differences[way] = difference
        return result

    def _ways(
        self, prompt_ids: Sequence[int], turn: int, max_new_tokens: int
    ) -> dict[str, Callable[[], Answer]]:
        """The ways of decoding this prompt by name, the baseline first."""
        tell = functools.partial(decode, prompt_ids=prompt_ids, max_new_tokens=max_new_tokens)
        ways: dict[str, Callable[[], Answer]] = {
            BASELINE: functools.partial(tell, self.decoder, BASELINE, plan=PLAIN),
            CHOSEN: functools.partial(tell, self.decoder, CHOSEN, plan=self.chosen),
        }
        settings = self.config.eval
        for size in settings.fixed_total_tokens:
            plan = self._fixed_plan(size)
            ways[tree_way(size)] = functools.partial(tell, self.decoder, tree_way(size), plan=plan)
            if self.untrained is not None and turn < settings.untrained_prompts:
                name = tree_way(size, "untrained")
                ways[name] = functools.partial(tell, self.untrained, name, plan=plan)
        if turn < settings.hf_generate_prompts:
            ways[HF_GENERATE] = functools.partial(
                hf_generate, self.decoder.target, prompt_ids, max_new_tokens
            )
        return ways

    def _fixed_plan(self, size: int) -> TreePlan:
        """A fixed size has the configured depth, whatever `auto` chose."""
        if size == 1:
            return PLAIN
        return TreePlan(size, self.config.decode.depth, self.config.decode.top_k)

    def _untrained_decoder(self) -> SpeculativeDecoder | None:
        if self.decoder.head is None or not self.config.eval.untrained_prompts:
            return None
        target = self.decoder.target
        head = untrained_head(self.config, target, self.decoder.head)
        return SpeculativeDecoder(target, head, self.config.decode)

    def _warm_up(self) -> None:
        """The first passes of a process are several times slower than the later ones."""
        prompt_ids = [token % self.decoder.target.vocab_size for token in range(1, 33)]
        for way in self._ways(prompt_ids, 0, WARM_UP_TOKENS).values():
            way()


def _in_turn(ways: dict[str, Callable[[], Answer]], turn: int) -> list[Answer]:
    """Run the ways one after the other, starting with another one at each turn."""
    order: list[Any] = list(ways.values())
    start = turn % len(order)
    return [way() for way in (*order[start:], *order[:start])]


def select_prompts(prompts: Sequence[Prompt], most: int | None) -> list[Prompt]:
    """At most `most` prompts, taken from each task in turn, in each from its categories in turn.

    Within a category they come in the file's order.
    """
    by_task = _grouped(prompts, lambda prompt: prompt.task)
    mixed = [
        _alternating(_grouped(members, lambda prompt: prompt.category or "")) for members in by_task
    ]
    return _alternating(mixed)[:most]


def _grouped(prompts: Iterable[Prompt], key: Callable[[Prompt], str]) -> list[list[Prompt]]:
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(key(prompt), []).append(prompt)
    return list(groups.values())


def _alternating(groups: Sequence[Sequence[Prompt]]) -> list[Prompt]:
    """The first of each group, then the second of each, …"""
    rounds = itertools.zip_longest(*groups)
    return [prompt for one in rounds for prompt in one if prompt is not None]
