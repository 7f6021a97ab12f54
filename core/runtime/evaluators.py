"""The processes that evaluate, and the files in which their results wait for the report.

Prompts are dealt out to several of them where `eval.num_replicas` says so. A replica times its
answers only where it has its device to itself: a GPU, or all CPUs of a node.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch

from core.config import Config
from core.data.prompts import Prompt
from core.decode.tree import TreePlan
from core.evaluate.batches import BatchKey, BatchRun, Question
from core.evaluate.memory import memory_figures
from core.evaluate.session import EvaluationSession
from core.evaluate.speculation import PromptResult, ResultKey
from core.paths import write_atomically
from core.progress import Progress, say
from core.runtime.pool import PoolSize, replicas_that_fit

STAGE = "evaluate_draft"
Record = TypeVar("Record")


@dataclass(frozen=True)
class Unanswered:
    """A prompt of which turns are still to be answered.

    Attributes:
        number: the prompt's place, from 0.
        prompt: itself.
        said: the answers that an interrupted run got to the turns before.
        temperature: of the answers.
    """

    number: int
    prompt: Prompt
    said: tuple[str, ...]
    temperature: float = 0.0


def unanswered(
    prompts: Sequence[Prompt],
    results: Mapping[ResultKey, PromptResult],
    turns: int | None,
    temperatures: Sequence[float] = (0.0,),
) -> list[Unanswered]:
    """What an interrupted run has left to do, one temperature after the other."""
    found = []
    for temperature, (number, prompt) in itertools.product(temperatures, enumerate(prompts)):
        names = [(temperature, name) for name in prompt.ids(turns)]
        said = [results[name].text for name in itertools.takewhile(results.__contains__, names)]
        if len(said) < len(names):
            found.append(Unanswered(number, prompt, tuple(said), temperature))
    return found


class Evaluator:
    """Ray actor around an `EvaluationSession`."""

    def __init__(self, config: Config, chosen: TreePlan | None) -> None:
        threads = max(1, int(config.eval.cpus))
        self.session = EvaluationSession(config, threads, chosen)

    def about(self) -> dict[str, Any]:
        """The chosen tree, how it was chosen, and the machine."""
        device = self.session.decoder.target.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        chosen = self.session.chosen
        return {
            "chosen": {"total_tokens": chosen.total_tokens, "depth": chosen.depth},
            "calibration": self.session.calibration,
            "device": name,
            "threads": torch.get_num_threads(),
            "memory": memory_figures(self.session.decoder.target),
        }

    def device(self) -> str:
        """What must not be shared for time to count: a node's CPUs, or GPUs of it."""
        context = ray.get_runtime_context()
        gpus = ",".join(ray.get_gpu_ids() and map(str, ray.get_gpu_ids()))
        return f"{context.get_node_id()}/{gpus}"

    def check_prompts(self, prompts: list[Prompt]) -> None:
        """See `EvaluationSession.check_prompts`."""
        self.session.check_prompts(prompts)

    def answer_all(self, work: list[Unanswered], timed: bool) -> Iterator[dict[str, Any]]:
        """Results one by one, as they are ready; without seconds where time does not count."""
        for one in work:
            for result in self.session.answer(one.prompt, one.number, one.said, one.temperature):
                yield (result if timed else result.untimed()).as_dict()

    def questions(
        self, prompts: list[Prompt], results: dict[ResultKey, PromptResult], temperature: float
    ) -> list[Question]:
        """See `EvaluationSession.questions`."""
        return self.session.questions(prompts, results, temperature)

    def run_batches(
        self, questions: list[Question], done: set[BatchKey]
    ) -> Iterator[dict[str, Any]]:
        """See `EvaluationSession.run_batches`."""
        for run in self.session.run_batches(questions, done):
            yield run.as_dict()


class Evaluators:
    """One evaluator, which has chosen the tree, and further ones while prompts are answered.

    Attributes:
        about: the first one's.
    """

    def __init__(self, config: Config, prompts: list[Prompt], about: dict[str, Any] | None) -> None:
        """Start the first one, which measures while it is alone.

        Args:
            config: sections target, draft, decode, eval.
            prompts: all of the evaluation, which must fit.
            about: what an interrupted run had measured.
        Raises:
            UserError: see `EvaluationSession`.
        """
        self.config = config
        self.first = self._start(_chosen(config, about))
        ray.get(self.first.check_prompts.remote(prompts))
        if about is None:
            say(STAGE, "loading, and measuring which tree size pays")
            about = ray.get(self.first.about.remote())
        self.about = about

    def answer(self, work: Sequence[Unanswered]) -> Iterator[dict[str, Any]]:
        """Results as they are ready, from as many replicas as the cluster has room for."""
        settings = self.config.eval
        size = PoolSize(settings.num_replicas, settings.cpus, settings.gpus)
        count = replicas_that_fit(size, len(work), STAGE, "eval.num_replicas")
        others = [self._start(_chosen(self.config, self.about)) for _ in range(count - 1)]
        replicas = [self.first, *others]
        devices = ray.get([one.device.remote() for one in replicas])
        shared = Counter(devices)
        if any(number > 1 for number in shared.values()):
            say(STAGE, f"{count} replicas on {len(shared)} devices: those that share one leave "
                "speed out")  # fmt: skip
        streams = [
            one.answer_all.options(num_returns="streaming").remote(
                list(work[place::count]), shared[device] == 1
            )
            for place, (one, device) in enumerate(zip(replicas, devices, strict=True))
        ]
        yield from _as_they_come(streams)
        for one in others:
            ray.kill(one)

    def run_batches(
        self,
        prompts: list[Prompt],
        results: Mapping[ResultKey, PromptResult],
        done: set[BatchKey],
    ) -> Iterator[dict[str, Any]]:
        """Runs as they are ready, by the first replica, which is alone again."""
        for temperature in self.config.eval.temperatures:
            questions = self.first.questions.remote(prompts, dict(results), temperature)
            run = self.first.run_batches.options(num_returns="streaming")
            yield from _as_they_come([run.remote(questions, done)])

    def stop(self) -> None:
        """Free what the first one takes."""
        ray.kill(self.first)

    def _start(self, chosen: TreePlan | None) -> Any:
        settings = self.config.eval
        threads = str(max(1, int(settings.cpus)))
        options = {
            "num_cpus": settings.cpus,
            "num_gpus": settings.gpus,
            # OpenMP reads this when torch is loaded, before any code of ours runs.
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads}},
        }
        return ray.remote(Evaluator).options(**options).remote(self.config, chosen)


def _chosen(config: Config, about: Mapping[str, Any] | None) -> TreePlan | None:
    return None if about is None else TreePlan(**about["chosen"], top_k=config.decode.top_k)


def _as_they_come(streams: list[Any]) -> Iterator[dict[str, Any]]:
    """What several generators give, in the order in which it comes."""
    while streams:
        (ready, *_), _ = ray.wait(streams, num_returns=1)
        try:
            yield ray.get(next(ready))
        except StopIteration:
            streams = [stream for stream in streams if stream is not ready]


def collect_answers(
    found: Iterator[dict[str, Any]], total: int, path: Path, results: dict[ResultKey, PromptResult]
) -> None:
    """Write results down as they come, a line each, and take them in."""
    with (
        Progress(STAGE, total, "prompts", skipped=len(results)) as progress,
        path.open("a", encoding="utf-8") as file,
    ):
        for values in found:
            _write_line(file, values)
            result = PromptResult.from_dict(values)
            results[result.key] = result
            answers = itertools.chain.from_iterable(values["answers"].values())
            progress.advance(1, tokens=sum(len(answer["token_ids"]) for answer in answers))


def collect_batches(found: Iterator[dict[str, Any]], path: Path, runs: list[BatchRun]) -> None:
    """The same for runs of batches."""
    with path.open("a", encoding="utf-8") as file:
        for values in found:
            _write_line(file, values)
            runs.append(BatchRun.from_dict(values))
            say(STAGE, f"{_described(runs[-1])}")


def _described(run: BatchRun) -> str:
    head = f"temperature {run.temperature:g}, {run.batch_size} at a time, {run.way}"
    if run.arrivals:
        return f"{head}, random arrivals: {len(run.differences)} of {run.answers} answers differ"
    tokens, seconds = (sum(column) for column in zip(*run.pieces, strict=True))
    return f"{head}, repeat {run.repeat + 1}: {tokens / seconds:.1f} tokens/s"


def _write_line(file: Any, values: Mapping[str, Any]) -> None:
    file.write(json.dumps(values, ensure_ascii=False) + "\n")
    file.flush()


def read_answers(path: Path) -> dict[ResultKey, PromptResult]:
    """Results of an interrupted run."""
    return {result.key: result for result in _read_lines(path, PromptResult.from_dict)}


def read_batches(path: Path) -> list[BatchRun]:
    """Runs of an interrupted run."""
    return _read_lines(path, BatchRun.from_dict)


def _read_lines(path: Path, parse: Callable[[dict[str, Any]], Record]) -> list[Record]:
    """What was written line by line; a line that was cut off in writing is taken out."""
    if not path.exists():
        return []
    # Not splitlines: it also splits at U+2028 and the like, which JSON strings may hold.
    complete = [line + "\n" for line in path.read_text("utf-8").split("\n")[:-1]]
    write_atomically(path, "".join(complete).encode())
    return [parse(json.loads(line)) for line in complete]
