"""A target's further training, from examples to an HF folder.

`prepare_finetuning` runs once and raises whatever the user can mend; what it returns goes to every
worker, which calls `finetune`.
"""

from __future__ import annotations

import inspect
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from core.config import Config
from core.data.example_dataset import ExampleDataset
from core.data.examples import example_shards, read_metadata
from core.data.template import tokenizer_hash
from core.errors import ConfigError, InputError, MismatchError
from core.models.adapters import (
    count_trained,
    load_for_training,
    merge_adapters,
    save_adapters,
)
from core.models.folder import model_folder
from core.models.stage_adapters import StageAdapters
from core.models.stage_saving import write_merged, write_stages
from core.models.stages import ModelStages
from core.models.target import load_tokenizer, target_fingerprint, target_folder
from core.models.weights import check_readable, load_causal_lm
from core.provenance import git_revision, versions
from core.train.causal import CausalBatches, CausalTrainee
from core.train.engine import FILE, build_engine
from core.train.loop import BEST, Host, TrainingLoop
from core.train.memory import PEAK, memory_figures
from core.train.order import TOKENS_AHEAD, Selection, TrainingOrder, select_examples
from core.train.pipeline_engine import StagedTrainee, stage_bounds
from core.train.state import TrainState
from core.train.task import HELD_OUT, TRAIN, log_opener

MODEL_FOLDER, ADAPTER_FOLDER = "model", "adapter"


@dataclass(frozen=True)
class FinetuneTask:
    """What to train, decided before any worker starts.

    Attributes:
        config: resolved.
        target: the target's location, the same for every node.
        examples: the folder that prepare_data wrote.
        fingerprint: of the target.
        parameters: of the model, its adapters not counted.
        trained_parameters: those that are trained.
        training: the sequences to learn from.
        held_out: those to evaluate on; None where there are none.
        code: versions and commit of the code that trains.
    """

    config: Config
    target: str
    examples: Path
    fingerprint: str
    parameters: int
    trained_parameters: int
    training: Selection
    held_out: Selection | None
    code: dict[str, Any]

    @property
    def order(self) -> TrainingOrder:
        """Which sequences each step trains on."""
        return TrainingOrder.of(self.training, self.config.train)

    def new_trainee(self, device: torch.device) -> CausalTrainee:
        """The model as it is before the first step."""
        train, finetune = self.config.train, self.config.finetune
        dtype: torch.dtype = getattr(torch, train.dtype)
        folder = target_folder(self.target)
        if train.parallelism == "pipeline":
            return StagedTrainee(_stages(folder, self.config, device), finetune)
        model = load_for_training(folder, finetune, dtype, device, train.seed)
        return CausalTrainee(model, finetune)

    def batches(self, split: str, device: torch.device) -> CausalBatches:
        """Makes the batches of `train` or `held_out`."""
        selection = self.training if split == TRAIN else self.held_out
        assert selection is not None
        source = ExampleDataset(self.examples, split)
        packing = self.config.finetune.packing
        return CausalBatches(source, selection, device, packing, self.config.train.seed)


def prepare_finetuning(config: Config, target: str, examples: Path) -> FinetuneTask:
    """Read what there is to train on; depends on config and inputs alone.

    Args:
        config: resolved.
        target: its location.
        examples: the folder that prepare_data wrote.
    Raises:
        MismatchError: the examples were made with another tokenizer.
        InputError: no examples, or nothing supervised in them.
        ConfigError: fewer sequences than a global batch, sequences longer than the target takes,
            adapters for no layer, packing for a model without position ids, or a pipeline that
            does not divide the model.
    """
    folder = target_folder(target)
    shards = example_shards(examples, TRAIN)
    if not shards:
        raise InputError(f"data.examples={examples}: no examples; run prepare_data again")
    if read_metadata(shards[0]).tokenizer_hash != tokenizer_hash(load_tokenizer(folder)):
        raise MismatchError(
            f"data.examples={examples} was made with another tokenizer than that of "
            f"target.path={config.target.path}; run prepare_data with this target"
        )
    check_target(folder, config)
    parameters, trained = count_trained(folder, config.finetune)
    longest = config.train.max_length
    selections = {
        split: select_examples(ExampleDataset(examples, split), longest, TOKENS_AHEAD)
        for split in (TRAIN, HELD_OUT)
    }
    training, held_out = selections[TRAIN], selections[HELD_OUT]
    _check_longest(folder, config, training)
    task = FinetuneTask(
        config=config,
        target=target,
        examples=examples,
        fingerprint=target_fingerprint(folder),
        parameters=parameters,
        trained_parameters=trained,
        training=training,
        held_out=held_out if len(held_out) else None,
        code={**versions(), "git": git_revision()},
    )
    assert task.order.total_steps > 0
    return task


def _stages(folder: Path, config: Config, device: torch.device | None = None) -> ModelStages:
    """The model in parts, as a pipeline trains it; nothing is loaded."""
    finetune, train = config.finetune, config.train
    adapters = None if finetune.method == "full" else StageAdapters(finetune, train.seed)
    dtype: torch.dtype = getattr(torch, train.dtype)
    return ModelStages(folder, dtype=dtype, device=device, adapters=adapters)


def check_target(folder: Path, config: Config) -> None:
    """Refuse what the target alone shows to be wrong; it costs nothing, and needs no examples.

    Args:
        folder: of the target.
        config: resolved.
    Raises:
        InputError: a file of its weights is damaged.
        ConfigError: packing for a model without position ids, or a pipeline that does not divide
            the model.
    """
    check_readable(folder)
    model = AutoConfig.from_pretrained(folder)
    named = inspect.signature(MODEL_FOR_CAUSAL_LM_MAPPING[type(model)].forward).parameters
    if config.finetune.packing and "position_ids" not in named:
        raise ConfigError(
            f"finetune.packing=true: a model of type {model.model_type} takes no position ids, by "
            "which packed sequences are told apart; set finetune.packing=false"
        )
    if config.train.parallelism == "pipeline":
        stage_bounds(_stages(folder, config), config.train)


def _check_longest(folder: Path, config: Config, training: Selection) -> None:
    model = AutoConfig.from_pretrained(folder)
    # A model of relative positions, such as Bloom, has no longest sequence.
    limit = getattr(model.get_text_config(), "max_position_embeddings", None)
    longest = int(training.lengths_N.max(initial=0))
    if limit is not None and longest > limit:
        raise ConfigError(
            f"train.max_length={config.train.max_length}: the target takes sequences of up to "
            f"{limit} tokens, and the longest here has {longest}; lower it to that"
        )


def finetune(
    task: FinetuneTask, output: Path, run_id: str, host: Host, device: torch.device
) -> dict[str, Any]:
    """Train on this worker; the first worker logs and saves `<output>/model`.

    Expects an initialized process group. Returns the figures of the report, the same on all
    workers but for times.
    Raises:
        StageError: the loss is not a number; on all workers.
    """
    engine = build_engine(task.new_trainee(device), task.config.train, device)
    with tempfile.TemporaryDirectory(prefix="aerie-") as scratch:
        loop = TrainingLoop(
            engine=engine,
            order=task.order,
            training=task.batches(TRAIN, device),
            held_out=None if task.held_out is None else task.batches(HELD_OUT, device),
            config=task.config.train,
            host=host,
            open_log=log_opener(task, output, run_id) if host.rank == 0 else None,
            scratch=Path(scratch),
        )
        figures = {**_figures(task, loop.run()), "peak_memory_mib": memory_figures(device)[PEAK]}
        with host.last_checkpoint() as folder:
            if folder is not None:
                files = [folder / name for name in (FILE, BEST)]
                figures["checkpoint_bytes"] = sum(f.stat().st_size for f in files if f.exists())
        weights = loop.result()
        if host.rank == 0:
            figures |= save_result(task, output, weights)
    return figures


def save_result(task: FinetuneTask, output: Path, weights: Path) -> dict[str, Any]:
    """Write the HF folder, and that of the adapters if there are some; returns their sizes.

    Args:
        task: what was trained.
        output: the run's folder.
        weights: a file of the trained ones by name, float32.
    """
    target, finetune = target_folder(task.target), task.config.finetune
    sizes: dict[str, Any] = {"adapter_bytes": None}
    if finetune.method != "full":
        adapters = output / ADAPTER_FOLDER
        trained = load_file(weights)
        sizes["adapter_bytes"] = save_adapters(adapters, trained, finetune, target, task.target)
    with model_folder(output / MODEL_FOLDER, target) as (folder, dtype):
        pipeline = task.config.train.parallelism == "pipeline"
        if finetune.method != "full" and pipeline:
            adapted = ModelStages(target, adapters=StageAdapters(finetune))
            write_merged(adapted, weights, folder, dtype)
        elif finetune.method != "full":
            merged: Any = merge_adapters(target, adapters)
            merged.to(dtype).save_pretrained(folder)
        elif pipeline:
            # Of a model that may be larger than any worker's memory.
            write_stages(ModelStages(target, dtype=dtype), weights, folder)
        else:
            model = load_causal_lm(target, dtype=torch.float32)
            found = model.load_state_dict(load_file(weights), strict=False)
            own = dict(model.named_parameters())
            assert not found.unexpected_keys and not own.keys() & set(found.missing_keys)
            model.to(dtype).save_pretrained(folder)
    files = (output / MODEL_FOLDER).iterdir()
    return {**sizes, "model_bytes": sum(file.stat().st_size for file in files)}


def _figures(task: FinetuneTask, state: TrainState) -> dict[str, Any]:
    # Of the model that is saved.
    saved = state.best or state.held_out
    return {
        "method": task.config.finetune.method,
        "parallelism": task.config.train.parallelism,
        "steps": state.step,
        "train_tokens": state.tokens,
        "epochs": state.step / task.order.steps_per_epoch,
        "initial_loss": state.initial_loss,
        "final_loss": state.final_loss,
        "held_out_loss_before": state.held_out_first.get("held_out_loss"),
        "held_out_top1_before": state.held_out_first.get("held_out_top1"),
        "held_out_loss": saved.get("held_out_loss"),
        "held_out_top1": saved.get("held_out_top1"),
        "model_step": state.best_step if state.best else state.step,
        "tokens_per_second": state.tokens / max(state.seconds, 1e-9),
        "seconds": state.seconds,
        "sequences": len(task.training),
        "left_out": task.training.left_out,
        "parameters": task.parameters,
        "trained_parameters": task.trained_parameters,
    }
