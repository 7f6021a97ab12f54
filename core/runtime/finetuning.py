"""finetune_target: the target itself trained by Ray Train workers.

Where there is no target or there are no examples yet, the run makes them first, in its own
folder, by the jobs that do so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from core.config import Config
from core.errors import ConfigError
from core.models.adapters import count_trained
from core.models.target import target_folder, target_location
from core.paths import resolve_path
from core.progress import say
from core.provenance import RunFolder
from core.runtime import conversion
from core.runtime.job import Job, run_stage
from core.runtime.preparation import data_inputs
from core.runtime.resources import Resources, check_resources
from core.runtime.workers import (
    Follower,
    RayHost,
    WorkerGroup,
    check_workers,
    least_workers,
    on_worker,
)
from core.train.curves import plot_curves
from core.train.finetune import FinetuneTask, check_target, finetune, prepare_finetuning
from core.train.memory import memory_advice

STAGE, RUN = "finetune_target", "target"
# Weights, two moments, the best weights, and maybe the moving average, all float32.
CHECKPOINT_BYTES_PER_PARAMETER = 20


def finetuning_inputs(config: Config) -> Mapping[str, Path]:
    """The target and the examples, or what they are made from."""
    inputs: dict[str, Path] = {}
    if config.target.path:
        inputs["target.path"] = target_folder(config.target.path)
    elif config.convert.source:
        inputs |= conversion.conversion_inputs(config)
    else:
        raise ConfigError(
            "target.path is not set; give an HF folder or a hub id, or a GGUF file as "
            "convert.source"
        )
    if config.data.examples:
        examples = resolve_path(config.data.examples, field="data.examples")
        inputs["data.examples"] = examples
    elif config.data.path:
        inputs |= data_inputs(config.data)
    else:
        raise ConfigError(
            "data.examples is not set; give the folder that prepare_data wrote, or conversations "
            "as data.path"
        )
    return inputs


def counted_sections(config: Config) -> tuple[str, ...]:
    """What the result depends on besides the inputs: also how they are made, where they are."""
    made = [] if config.target.path else ["convert"]
    made += [] if config.data.examples else ["target.template", "data"]
    return (*made, "finetune", "train")


def finetuning_resources(config: Config) -> Resources:
    """All workers at once, since they wait for each other; on disk checkpoints and result."""
    train = config.train
    disk = 0.1
    if config.target.path:
        total, trained = count_trained(target_folder(config.target.path), config.finetune)
        checkpoints = (train.keep_checkpoints + 1) * trained * CHECKPOINT_BYTES_PER_PARAMETER
        disk = (checkpoints + 4 * total) / 1e9
    return Resources(
        cpus=least_workers(train) * train.cpus_per_worker,
        gpus=least_workers(train) * train.gpus_per_worker,
        disk_gb=disk,
        because="train.num_workers times train.cpus_per_worker and train.gpus_per_worker",
    )


def finetune_target(config: Config, folder: RunFolder, preparation: Job) -> Mapping[str, Any]:
    """Train the model `<output>/model`; returns the report.

    Args:
        config: resolved.
        folder: of the run.
        preparation: the job that makes examples of conversations.
    Raises:
        UserError: config or inputs are wrong; before any worker starts.
        StageError: the loss is not a number, or too many workers were lost.
    """
    output = folder.path.absolute()
    config = _with_inputs(config, output, preparation)
    # Before that, a target that had to be made could not be counted.
    check_resources(finetuning_resources(config), config, STAGE)
    check_workers(config)
    target = target_location(str(config.target.path))
    task = prepare_finetuning(config, target, Path(str(config.data.examples)).absolute())
    order = task.order
    say(
        STAGE,
        f"{config.finetune.method}: {task.trained_parameters:,} parameters to train, of a model "
        f"of {task.parameters:,}; {len(task.training):,} sequences, {task.training.tokens:,} "
        f"tokens; {order.total_steps:,} steps of {config.train.global_batch_size} sequences",
    )
    say(STAGE, f"starting {config.train.num_workers} worker(s)")
    advice = memory_advice(config.train, config.finetune)
    group = WorkerGroup(STAGE, RUN, output, config.train, advice)
    settings = {"task": task, "output": output, "run_id": folder.identity[:16]}
    with Follower(output, order.total_steps, STAGE):
        figures = group.fit(_work, settings)
    plot_curves(output)
    say(STAGE, _summary(figures))
    return figures


def _with_inputs(config: Config, output: Path, preparation: Job) -> Config:
    """Make what is missing, each in a run folder of its own below this one."""
    if not config.target.path:
        made = conversion.with_converted_target(config.replace(output=str(output / "target")))
        config = config.replace(target={"path": made.target.path})
    if not config.data.examples:
        # Before conversations are prepared for it, which may take an hour.
        check_target(target_folder(target_location(str(config.target.path))), config)
        examples = str(output / "examples")
        run_stage(preparation, config.replace(output=examples))
        config = config.replace(data={"examples": examples})
    return config


def _work(settings: dict[str, Any]) -> dict[str, Any]:
    """What each worker runs."""
    task: FinetuneTask = settings["task"]

    def work(host: RayHost, device: torch.device) -> dict[str, Any]:
        return finetune(task, settings["output"], settings["run_id"], host, device)

    config = task.config
    return on_worker(config.train, memory_advice(config.train, config.finetune), work)


def _summary(figures: Mapping[str, Any]) -> str:
    text = (
        f"loss {figures['initial_loss']:.3f} → {figures['final_loss']:.3f}, "
        f"{figures['tokens_per_second']:,.0f} tokens/s"
    )
    if figures["held_out_loss"] is not None:
        text += (
            f"; held out: loss {figures['held_out_loss_before']:.3f} → "
            f"{figures['held_out_loss']:.3f}, top-1 {figures['held_out_top1_before']:.3f} → "
            f"{figures['held_out_top1']:.3f}; model of step {figures['model_step']:,}"
        )
    if figures["adapter_bytes"] is not None:
        text += f"; adapters {figures['adapter_bytes'] / 1e6:.1f} MB"
    return text
