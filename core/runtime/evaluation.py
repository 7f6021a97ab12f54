"""The stage evaluate_draft: one process that is alone on its CPUs or GPU, so that time counts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from core.config import Config
from core.data.prompts import Prompt, read_prompts
from core.decode.tree import TreePlan
from core.draft.folder import check_folder
from core.errors import ConfigError, InputError
from core.evaluate.page import read_samples, write_page
from core.evaluate.plots import plot_evaluation
from core.evaluate.session import EvaluationSession, select_prompts
from core.evaluate.speculation import PromptResult
from core.evaluate.summary import summarize
from core.evaluate.ways import fixed_plans, most_tokens
from core.models.target import target_folder
from core.paths import resolve_path, write_atomically
from core.progress import Progress, say
from core.provenance import RunFolder
from core.runtime.resources import Resources

STAGE = "evaluate_draft"


def evaluation_inputs(config: Config) -> dict[str, Path]:
    """Target, draft head and prompts.

    Raises:
        UserError: one of them is not set or not there.
    """
    if not config.eval.prompts:
        raise ConfigError(
            "eval.prompts is not set; give a JSONL of prompts, such as Spec-Bench's question.jsonl "
            "or the prompts.jsonl that prepare_data wrote"
        )
    if not config.draft.path and not config.decode.ngram_match:
        raise ConfigError(
            "draft.path is not set; give a draft head's folder (<output>/head), or "
            "decode.ngram_match to measure copying alone"
        )
    check_tree_sizes(config)
    _prompts(config)
    inputs = {"target.path": target_folder(config.target.path), **_prompt_files(config)}
    if config.draft.path:
        inputs["draft.path"] = resolve_path(config.draft.path, field="draft.path")
        check_folder(inputs["draft.path"])
    return inputs


def _prompt_files(config: Config) -> dict[str, Path]:
    """Config field → file; a list's members are told apart by their place in it."""
    locations = config.eval.prompts or ()
    if isinstance(locations, str):
        return {"eval.prompts": resolve_path(locations, field="eval.prompts")}
    return {
        f"eval.prompts[{number}]": resolve_path(location, field="eval.prompts")
        for number, location in enumerate(locations)
    }


def check_tree_sizes(config: Config) -> None:
    """Raise ConfigError where a fixed tree size is more than top-k and depth can fill."""
    for plan in fixed_plans(config).values():
        if plan.total_tokens > most_tokens(plan):
            raise ConfigError(
                f"eval.fixed_total_tokens: {plan.total_tokens} is outside 1..{most_tokens(plan)}, "
                f"which decode.top_k={plan.top_k} and a depth of {plan.depth} (eval.fixed_depths, "
                "else decode.depth) allow; change one of them"
            )


def evaluation_resources(config: Config) -> Resources:
    """One evaluating process."""
    return Resources(cpus=config.eval.cpus, gpus=config.eval.gpus, because="eval.cpus, eval.gpus")


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
        }

    def check_prompts(self, prompts: list[Prompt]) -> None:
        """See `EvaluationSession.check_prompts`."""
        self.session.check_prompts(prompts)

    def answer_all(self, work: list[Unanswered]) -> Iterator[dict[str, Any]]:
        """Results one by one, as they are ready."""
        for one in work:
            for result in self.session.answer(one.prompt, one.number, one.said):
                yield result.as_dict()


@dataclass(frozen=True)
class Unanswered:
    """A prompt of which turns are still to be answered.

    Attributes:
        number: the prompt's place, from 0.
        prompt: itself.
        said: the answers that an interrupted run got to the turns before.
    """

    number: int
    prompt: Prompt
    said: tuple[str, ...]


def _unanswered(
    prompts: list[Prompt], results: Mapping[str, PromptResult], turns: int | None
) -> list[Unanswered]:
    found = []
    for number, prompt in enumerate(prompts):
        names = prompt.ids(turns)
        said = [results[name].text for name in itertools.takewhile(results.__contains__, names)]
        if len(said) < len(names):
            found.append(Unanswered(number, prompt, tuple(said)))
    return found


def evaluate_draft(config: Config, folder: RunFolder) -> Mapping[str, Any]:
    """Answer all prompts, write `outputs.jsonl` as they come, then plots and a page."""
    prompts = _prompts(config)
    if not prompts:
        raise InputError(f"eval.prompts={config.eval.prompts} holds no prompt")
    outputs = folder.path / "outputs.jsonl"
    results = _read_outputs(outputs)
    about_file = folder.path / "about.json"
    about = json.loads(about_file.read_text()) if about_file.exists() else None
    names = [name for prompt in prompts for name in prompt.ids(config.eval.turns)]
    unanswered = _unanswered(prompts, results, config.eval.turns)
    if unanswered:
        evaluator = _start_evaluator(config, about)
        ray.get(evaluator.check_prompts.remote(prompts))
        if about is None:
            say(STAGE, "loading, and measuring which tree size pays")
            about = ray.get(evaluator.about.remote())
            write_atomically(about_file, json.dumps(about).encode())
        say(STAGE, f"chosen tree: {about['chosen']['total_tokens']} nodes")
        _collect(evaluator, unanswered, len(names), outputs, results)
        ray.kill(evaluator)
    report = {
        **summarize([results[name] for name in names], list(fixed_plans(config))),
        **(about or {}),
    }
    report["settings"] = {
        "dtype": config.target.dtype,
        "max_new_tokens": config.eval.max_new_tokens,
        "temperature": 0,
        "repeats": config.eval.repeats,
        "ngram_match": config.decode.ngram_match,
        "hf_model": config.eval.hf_model,
        "hf_lookup_tokens": config.eval.hf_lookup_tokens,
    }
    plot_evaluation(report, folder.path)
    write_page(
        folder.path / "report.html",
        {STAGE: folder.path},
        {STAGE: report},
        read_samples(folder.path),
    )
    return report


def _prompts(config: Config) -> list[Prompt]:
    """Those that are answered, in order."""
    found = read_prompts(*_prompt_files(config).values())
    return select_prompts(found, config.eval.max_prompts, config.eval.tasks)


def _start_evaluator(config: Config, about: dict[str, Any] | None) -> Any:
    chosen = None
    if about is not None:
        chosen = TreePlan(**about["chosen"], top_k=config.decode.top_k)
    options = {
        "num_cpus": config.eval.cpus,
        "num_gpus": config.eval.gpus,
        # OpenMP reads this when torch is loaded, before any code of ours runs.
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(max(1, int(config.eval.cpus)))}},
    }
    return ray.remote(Evaluator).options(**options).remote(config, chosen)


def _collect(
    evaluator: Any,
    unanswered: list[Unanswered],
    total: int,
    outputs: Path,
    results: dict[str, PromptResult],
) -> None:
    stream = evaluator.answer_all.options(num_returns="streaming").remote(unanswered)
    with (
        Progress(STAGE, total, "prompts", skipped=len(results)) as progress,
        outputs.open("a", encoding="utf-8") as file,
    ):
        for reference in stream:
            values = ray.get(reference)
            file.write(json.dumps(values, ensure_ascii=False) + "\n")
            file.flush()
            results[values["id"]] = PromptResult.from_dict(values)
            answers = itertools.chain.from_iterable(values["answers"].values())
            tokens = sum(len(answer["token_ids"]) for answer in answers)
            progress.advance(1, tokens=tokens)


def _read_outputs(path: Path) -> dict[str, PromptResult]:
    """Results of an interrupted run; a line that was cut off in writing is left out."""
    if not path.exists():
        return {}
    # Not splitlines: it also splits at U+2028 and the like, which JSON strings may hold.
    complete = [line + "\n" for line in path.read_text("utf-8").split("\n")[:-1]]
    write_atomically(path, "".join(complete).encode())
    found = [PromptResult.from_dict(json.loads(line)) for line in complete]
    return {result.id: result for result in found}
