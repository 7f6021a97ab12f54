"""One process that evaluates a decoder, prompt by prompt."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from core.config import Config
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
        largest = max(self.chosen.total_tokens, *self.config.eval.fixed_total_tokens, 1)
        for prompt in prompts:
            prompt_ids = encode_prompt(self.decoder.target.tokenizer, prompt.messages)
            try:
                self.decoder.check_fits(prompt_ids, self.config.eval.max_new_tokens, largest)
            except InputError as error:
                raise InputError(f"prompt {prompt.id}: {error}") from error

    def answer(self, prompt: Prompt, turn: int) -> PromptResult:
        """Answer one prompt in every way; `turn` counts prompts from 0."""
        target = self.decoder.target
        prompt_ids = encode_prompt(target.tokenizer, prompt.messages)
        ways = self._ways(prompt_ids, turn, self.config.eval.max_new_tokens)
        answers = {answer.way: answer for answer in _in_turn(ways, turn)}
        # Told in the same order for every prompt.
        answers = {way: answers[way] for way in ways}
        baseline = next(iter(answers.values()))
        result = PromptResult(
            id=prompt.id,
            task=prompt.task,
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
    """At most `most` prompts, taken from each task in turn, in the file's order."""
    by_task: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_task.setdefault(prompt.task, []).append(prompt)
    longest = max((len(members) for members in by_task.values()), default=0)
    taken = [
        members[place]
        for place in range(longest)
        for members in by_task.values()
        if place < len(members)
    ]
    return taken[:most]
