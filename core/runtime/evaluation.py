"""The stage evaluate_draft: its inputs, its steps and its report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.config import Config
from core.data.prompts import Prompt, read_prompts
from core.draft.folder import check_folder
from core.errors import ConfigError, InputError
from core.evaluate.batch_summary import summarize_batches
from core.evaluate.page import read_samples, write_page
from core.evaluate.peers import check_peers
from core.evaluate.plots import plot_evaluation
from core.evaluate.session import select_prompts
from core.evaluate.summary import summarize
from core.evaluate.ways import fixed_plans, most_tokens
from core.models.target import target_folder
from core.paths import resolve_path, write_atomically
from core.progress import say
from core.provenance import RunFolder
from core.runtime.evaluators import (
    STAGE,
    Evaluators,
    collect_answers,
    collect_batches,
    read_answers,
    read_batches,
    unanswered,
)
from core.runtime.resources import Resources


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
    check_peers(config)
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
    """Raise ConfigError where a fixed tree size is more than top-k and depth can fill.

    Or where a temperature stands twice.
    """
    if len(set(config.eval.temperatures)) < len(config.eval.temperatures):
        raise ConfigError(f"eval.temperatures={list(config.eval.temperatures)} repeats one")
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


def evaluate_draft(config: Config, folder: RunFolder) -> Mapping[str, Any]:
    """Answer all prompts, one by one and in batches, then make plots and a page of it.

    What is measured is written down at once, to `outputs.jsonl` and `batches.jsonl`.
    """
    prompts = _prompts(config)
    if not prompts:
        raise InputError(f"eval.prompts={config.eval.prompts} holds no prompt")
    outputs, batch_file = folder.path / "outputs.jsonl", folder.path / "batches.jsonl"
    results, runs = read_answers(outputs), read_batches(batch_file)
    about_file = folder.path / "about.json"
    about = json.loads(about_file.read_text()) if about_file.exists() else None
    names = [name for prompt in prompts for name in prompt.ids(config.eval.turns)]
    temperatures = config.eval.temperatures
    work = unanswered(prompts, results, config.eval.turns, temperatures)
    if work or len(runs) < _num_runs(config):
        evaluators = Evaluators(config, prompts, about)
        about = evaluators.about
        write_atomically(about_file, json.dumps(about).encode())
        if about["calibration"]:
            nodes = about["chosen"]["total_tokens"]
            promising = f"trees of {nodes} nodes" if nodes > 1 else "no drafts"
            say(STAGE, f"for one request at a time, {promising} promise most")
        if work:
            total = len(names) * len(temperatures)
            collect_answers(evaluators.answer(work), total, outputs, results)
        done = {run.key for run in runs}
        if config.eval.batch_sizes:
            collect_batches(evaluators.run_batches(prompts, results, done), batch_file, runs)
        evaluators.stop()
    first, *others = (
        {
            **summarize([results[t, name] for name in names], list(fixed_plans(config))),
            "batches": summarize_batches([run for run in runs if run.temperature == t]),
        }
        for t in temperatures
    )
    report = {
        **first,
        "at_temperature": dict(zip(map(str, temperatures[1:]), others, strict=True)),
        **(about or {}),
        "settings": _settings(config),
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


def _num_runs(config: Config) -> int:
    """Of batches."""
    settings = config.eval
    timed = settings.repeats * (2 + len(fixed_plans(config)))
    runs = len(settings.batch_sizes) * (timed + bool(settings.arrivals))
    return runs * len(settings.temperatures)


def _settings(config: Config) -> dict[str, Any]:
    return {
        "dtype": config.target.dtype,
        "max_new_tokens": config.eval.max_new_tokens,
        "temperature": config.eval.temperatures[0],
        "repeats": config.eval.repeats,
        "ngram_match": config.decode.ngram_match,
        "hf_model": config.eval.hf_model,
        "hf_lookup_tokens": config.eval.hf_lookup_tokens,
        "vllm_drafts": config.eval.vllm_drafts,
    }
