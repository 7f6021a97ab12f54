"""One process that evaluates a decoder, prompt by prompt."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial

from core.config import Config
from core.data.conversations import Message
from core.data.prompts import Prompt
from core.data.template import encode_prompt
from core.decode.answering import seed_of
from core.decode.load import load_decoder
from core.decode.tree import TreePlan
from core.errors import ConfigError, InputError
from core.evaluate.batches import (
    BatchKey,
    BatchRun,
    Question,
    check_batch,
    run_batch,
    warm_up_batch,
)
from core.evaluate.speculation import (
    BASELINE,
    Answer,
    Difference,
    Draw,
    PromptResult,
    ResultKey,
    find_difference,
)
from core.evaluate.ways import CHOSEN, FOREIGN, Ways, rotated
from core.models.target import Target

WARM_UP_TOKENS = 8


class EvaluationSession:
    """A loaded decoder, and the ways of decoding to compare."""

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
        self.ways = Ways(self.config, loaded, num_threads)
        self._warm_up()

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Make sure that every prompt fits before the first is answered.

        Raises:
            InputError: one does not; the message names it.
        """
        settings = self.config.eval
        longest: list[Sequence[int]] = []
        # The tree that leaves least room decides.
        plan = min(self.ways.plans(), key=self.decoder.longest)
        for prompt in prompts:
            turns = len(prompt.ids(settings.turns))
            # The answers in between are not known yet, but how long they may be is.
            messages = prompt.after(["…"] * (turns - 1))
            prompt_ids = encode_prompt(self.decoder.target.tokenizer, messages)
            try:
                self.decoder.check_fits(prompt_ids, settings.max_new_tokens * turns, plan)
            except InputError as error:
                raise InputError(f"prompt {prompt.id}: {error}") from error
            # As long as its last turn may get, the question of which knows no tokens yet.
            longest.append([*prompt_ids, *prompt_ids[:1] * settings.max_new_tokens * (turns - 1)])
        self._check_batches(longest)

    def _check_batches(self, prompts: Sequence[Sequence[int]]) -> None:
        if self.config.eval.batch_sizes:
            most = max(self.config.eval.batch_sizes)
            by_length = sorted(prompts, key=len, reverse=True)
            together = list(itertools.islice(itertools.cycle(by_length), most))
            for way in self.ways.batched:
                check_batch(way, together, self.config.eval.max_new_tokens)

    def answer(
        self, prompt: Prompt, turn: int, said: Sequence[str] = (), temperature: float = 0.0
    ) -> Iterator[PromptResult]:
        """Answer one prompt in every way, turn by turn, as far as `eval.turns` goes.

        Every way answers a turn on top of the baseline's answers to those before, so that all
        have the same prompt.

        Args:
            prompt: to answer.
            turn: counts prompts from 0.
            said: the baseline's answers to the turns that are answered already.
            temperature: of all answers.
        """
        answers = list(said)
        for name in prompt.ids(self.config.eval.turns)[len(answers) :]:
            draw = self._draw(name, temperature)
            result = self._answer_turn(prompt, name, prompt.after(answers), turn, draw)
            yield result
            answers.append(result.text)

    def _answer_turn(
        self, prompt: Prompt, name: str, messages: Sequence[Message], turn: int, draw: Draw
    ) -> PromptResult:
        target = self.decoder.target
        prompt_ids = encode_prompt(target.tokenizer, messages)
        ways = self.ways.of(prompt_ids, turn, self.config.eval.max_new_tokens, draw)
        repeats = [_in_turn(ways, turn + repeat) for repeat in range(self.config.eval.repeats)]
        answers = {way: tuple(repeat[way] for repeat in repeats) for way in ways}
        baseline = answers[BASELINE][0]
        return PromptResult(
            id=name,
            task=prompt.task,
            category=prompt.category,
            prompt_tokens=len(prompt_ids),
            text=target.tokenizer.decode(baseline.token_ids, skip_special_tokens=True),
            answers=answers,
            differences=_differences(target, prompt_ids, answers, draw.temperature > 0),
            temperature=draw.temperature,
        )

    def _draw(self, name: str, temperature: float) -> Draw:
        """The same for all ways and repeats, which thereby do the same work."""
        return Draw(temperature, seed_of(self.config.eval.seed, name, 0))

    def questions(
        self,
        prompts: Sequence[Prompt],
        results: Mapping[ResultKey, PromptResult],
        temperature: float = 0.0,
    ) -> list[Question]:
        """What is asked in batches: every turn of the prompts, after the baseline's answers."""
        found = []
        for prompt in prompts:
            names = prompt.ids(self.config.eval.turns)
            said = [results[temperature, name].text for name in names]
            for turn, name in enumerate(names):
                messages = prompt.after(said[:turn])
                prompt_ids = encode_prompt(self.decoder.target.tokenizer, messages)
                wanted = results[temperature, name].answers[BASELINE][0].token_ids
                draw = self._draw(name, temperature)
                found.append(Question(name, tuple(prompt_ids), wanted, draw))
        return found

    def run_batches(
        self, questions: Sequence[Question], done: Collection[BatchKey]
    ) -> Iterator[BatchRun]:
        """Every way at every batch size, once a repeat, in turn; and one run with arrivals.

        Args:
            questions: at least one, of one temperature.
            done: runs that are left out.
        """
        settings = self.config.eval
        temperature = questions[0].draw.temperature
        for batch_size in settings.batch_sizes:
            run = partial(
                run_batch,
                questions=questions,
                batch_size=batch_size,
                max_new_tokens=settings.max_new_tokens,
            )
            todo = [
                (way, repeat)
                for repeat in range(settings.repeats)
                for way in rotated(self.ways.batched, repeat)
                if (temperature, batch_size, repeat, way.name, 0.0) not in done
            ]
            if todo:
                warm_up_batch(todo[0][0], questions, batch_size)
            for way, repeat in todo:
                yield run(way, repeat=repeat)
            if settings.arrivals:
                chosen = next(way for way in self.ways.batched if way.name == CHOSEN)
                if (temperature, batch_size, 0, CHOSEN, settings.arrivals) not in done:
                    yield run(chosen, arrivals=settings.arrivals)

    def _warm_up(self) -> None:
        """The first passes of a process are several times slower than the later ones."""
        prompt_ids = [token % self.decoder.target.vocab_size for token in range(1, 33)]
        for way in self.ways.of(prompt_ids, 0, WARM_UP_TOKENS).values():
            way()


def _in_turn(ways: Mapping[str, Callable[[], Answer]], turn: int) -> dict[str, Answer]:
    """Run the ways one after the other, starting with another one at each turn."""
    return {way: ways[way]() for way in rotated(list(ways), turn)}


def _differences(
    target: Target,
    prompt_ids: Sequence[int],
    answers: Mapping[str, Sequence[Answer]],
    sampled: bool,
) -> dict[str, Difference]:
    """Where Aerie's ways leave the baseline's first answer, the baseline's repeats among them."""
    wanted = answers[BASELINE][0].token_ids
    found: dict[str, Difference] = {}
    for way, repeats in answers.items():
        for got in repeats if way not in FOREIGN else ():
            place = find_difference(target, prompt_ids, wanted, got.token_ids, sampled=sampled)
            if place is not None:
                found.setdefault(way, place)
    return found


def select_prompts(
    prompts: Sequence[Prompt], most: int | None, tasks: Sequence[str] | None = None
) -> list[Prompt]:
    """At most `most` prompts, taken from each task in turn, in each from its categories in turn.

    Within a category they come in the file's order.

    Args:
        prompts: to choose from.
        most: None takes all.
        tasks: whose prompts alone are taken; None takes all.
    Raises:
        ConfigError: no prompt is of one of the tasks.
    """
    there = list(dict.fromkeys(prompt.task for prompt in prompts))
    if unknown := [task for task in tasks or () if task not in there]:
        raise ConfigError(
            f"eval.tasks: no prompt is of {', '.join(unknown)}; there are {', '.join(there)}"
        )
    prompts = [prompt for prompt in prompts if tasks is None or prompt.task in tasks]
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
