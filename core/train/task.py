"""A draft head's training from its inputs to the saved head.

`prepare` runs once and raises whatever the user can mend; what it returns goes to every worker,
which calls `train`. Shapes: V target vocabulary, W draft vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from core.config import Config
from core.data.example_dataset import ExampleDataset
from core.data.feature_manifest import Manifest, read_manifest
from core.data.feature_shards import FeatureDataset
from core.draft.base import DraftHead, TargetGeometry, build_head
from core.draft.folder import load_head, save_head
from core.draft.vocabulary import DraftVocabulary
from core.errors import ConfigError, InputError
from core.models.features import check_layers
from core.models.target import target_fingerprint, target_folder
from core.models.weights import load_embedding, load_output_head
from core.provenance import git_revision, versions
from core.tracking import MetricLog
from core.train.batches import BatchMaker
from core.train.draft import DraftTrainee
from core.train.engine import build_engine
from core.train.evaluation import ACCEPTED_DEPTH, ACCEPTED_LENGTH
from core.train.loop import Host, TrainingLoop
from core.train.order import FeatureSource, Selection, TrainingOrder, select_examples
from core.train.start import load_start, start_vocabulary
from core.train.state import TrainState, trim_metrics

HEAD_FOLDER = "head"
TRAIN, HELD_OUT = "train", "held_out"


@dataclass(frozen=True)
class DraftTask:
    """What to train, decided before any worker starts.

    Attributes:
        config: resolved.
        target: the target's location, the same for every node.
        features: the feature folder; the folder of examples where features are streamed.
        streamed: whether they are.
        manifest: what the features are.
        fingerprint: of the target.
        vocabulary: that the head may propose.
        coverage: share of the supervised tokens that are in it.
        training: the sequences to learn from.
        held_out: those to evaluate on; None where the features have none.
        start: folder of the head to go on from; None to start anew.
        code: versions and commit of the code that trains.
    """

    config: Config
    target: str
    features: Path
    streamed: bool
    manifest: Manifest
    fingerprint: str
    vocabulary: DraftVocabulary
    coverage: float
    training: Selection
    held_out: Selection | None
    start: Path | None
    code: dict[str, Any]

    @property
    def order(self) -> TrainingOrder:
        """Which sequences each step trains on."""
        return TrainingOrder.of(self.training, self.config.train)

    def new_head(self) -> DraftHead:
        """A head of the task's shape, float32 on CPU, its weights random."""
        geometry = TargetGeometry.of(AutoConfig.from_pretrained(target_folder(self.target)))
        return build_head(self.config.draft, geometry, self.vocabulary, self.config.train.seed)

    def first_head(self, output_head_VH: Tensor) -> DraftHead:
        """The head as it is before the first step.

        Args:
            output_head_VH: [V, H], the target's.
        """
        head = self.new_head()
        if self.start is None:
            head.start_from(output_head_VH)
        else:
            head.load_state_dict(load_head(self.start).state_dict())
        return head


def count_parameters(config: Config, target: Path) -> int:
    """Trained weights of such a head for such a target; nothing is allocated."""
    geometry = TargetGeometry.of(AutoConfig.from_pretrained(target))
    with torch.device("meta"):
        size = min(config.draft.vocab_size or geometry.vocab_size, geometry.vocab_size)
        vocabulary = DraftVocabulary(torch.arange(size), geometry.vocab_size)
        head = build_head(config.draft, geometry, vocabulary)
    return sum(parameter.numel() for parameter in head.parameters())


SourceOpener = Callable[[DraftTask, str], FeatureSource]
"""Opens a split (`train`, `held_out`) of a task on a worker."""


def open_shards(task: DraftTask, split: str) -> FeatureDataset:
    """The features of a split, from disk."""
    return FeatureDataset(task.features, split, task.fingerprint)


def prepare(
    config: Config,
    target: str,
    features: Path,
    streamed: Manifest | None = None,
    start: Path | None = None,
) -> DraftTask:
    """Read what there is to train on; depends on config and inputs alone.

    Args:
        config: resolved.
        target: its location.
        features: the feature folder; with `streamed`, the folder of examples.
        streamed: what the features will be where they are streamed; None where they are on disk.
        start: folder of the head to go on from; None to start anew.
    Raises:
        MismatchError: the features come from another target, or `start` is another kind of head.
        InputError: no features, nothing supervised in them, or an example too long to stream.
        ConfigError: fewer sequences than a global batch, settings that exclude each other, or
            features without the layers that the head reads.
    """
    if config.train.parallelism == "pipeline":
        raise ConfigError(
            "train.parallelism=pipeline divides a target's layers, and a draft head has too few; "
            "choose ddp or zero1"
        )
    folder = target_folder(target)
    fingerprint = target_fingerprint(folder)

    def open_split(split: str) -> FeatureDataset | ExampleDataset:
        if streamed is not None:
            return ExampleDataset(features, split)
        return FeatureDataset(features, split, fingerprint)

    manifest = streamed or read_manifest(features)
    check_layers(config.draft, manifest.feature_layers, final_named=True)
    dataset = open_split(TRAIN)
    geometry = TargetGeometry.of(AutoConfig.from_pretrained(folder))
    counts_V = dataset.token_counts(geometry.vocab_size)
    if not int(counts_V.sum()):
        raise InputError(
            f"{features}: no token of the {len(dataset)} training examples is "
            "supervised; prepare the data anew and look at it with prepare_data --inspect"
        )
    if start is None:
        vocabulary = DraftVocabulary.from_counts(counts_V, config.draft.vocab_size)
    else:
        aux_layers = tuple(manifest.feature_layers[:-1])
        first = load_start(start, config.draft, geometry, fingerprint, aux_layers)
        vocabulary = start_vocabulary(first, counts_V, config.draft.vocab_size)
    training = select_examples(dataset, config.train.max_length)
    held_out = None
    if manifest.shards.get(HELD_OUT):
        held_out = select_examples(open_split(HELD_OUT), config.train.max_length)
    longest = min(config.train.max_length, manifest.max_length)
    if streamed is not None and longest > geometry.max_position_embeddings:
        raise ConfigError(
            f"train.max_length={config.train.max_length}: the target takes sequences of up to "
            f"{geometry.max_position_embeddings} tokens; lower it to that"
        )
    task = DraftTask(
        config=config,
        target=target,
        features=features,
        streamed=streamed is not None,
        manifest=manifest,
        fingerprint=fingerprint,
        vocabulary=vocabulary,
        coverage=vocabulary.coverage(counts_V),
        training=training,
        held_out=held_out if held_out is not None and len(held_out) else None,
        start=start,
        code={**versions(), "git": git_revision()},
    )
    assert task.order.total_steps > 0
    return task


def train(
    task: DraftTask,
    output: Path,
    run_id: str,
    host: Host,
    device: torch.device,
    open_source: SourceOpener = open_shards,
) -> dict[str, Any]:
    """Train on this worker; the first worker logs and saves the head to `<output>/head`.

    Expects an initialized process group. Features come from where `open_source` says. Returns
    the figures of the report, the same on all workers but for times.
    Raises:
        StageError: the loss is not a number; on all workers.
    """
    target = target_folder(task.target)
    output_head_VH = load_output_head(target)
    head = task.first_head(output_head_VH)
    parameters = sum(parameter.numel() for parameter in head.parameters())
    trainee = DraftTrainee(head, load_embedding(target), output_head_VH)
    engine = build_engine(trainee, task.config.train, device)
    held_out = None
    if task.held_out is not None:
        held_out = _batch_maker(task, open_source(task, HELD_OUT), task.held_out, device)
    with tempfile.TemporaryDirectory(prefix="aerie-") as scratch:
        loop = TrainingLoop(
            engine=engine,
            order=task.order,
            training=_batch_maker(task, open_source(task, TRAIN), task.training, device),
            held_out=held_out,
            config=task.config.train,
            host=host,
            open_log=log_opener(task, output, run_id) if host.rank == 0 else None,
            scratch=Path(scratch),
        )
        figures = {**_figures(task, loop.run()), "parameters": parameters}
        weights = loop.result()
        if host.rank == 0:
            trained = task.new_head()
            trained.load_state_dict(load_file(weights))
            save_head(output / HEAD_FOLDER, trained, _record(task, run_id, figures))
    return figures


class Described(Protocol):
    """What a run's log says of a task."""

    @property
    def config(self) -> Config:
        """Resolved."""

    @property
    def code(self) -> dict[str, Any]:
        """Versions and commit."""


def log_opener(task: Described, output: Path, run_id: str) -> Callable[[int], MetricLog]:
    """What the first worker opens its log with, once it knows at which step it goes on."""
    # The driver's own: workers may run elsewhere, from a copy without `.git`.
    about = {"config": task.config.model_dump(mode="json"), "code": task.code}

    def open_log(step: int) -> MetricLog:
        trim_metrics(output, step)
        return MetricLog(output, task.config.tracking, run_id, about, step)

    return open_log


def _batch_maker(
    task: DraftTask, source: FeatureSource, selection: Selection, device: torch.device
) -> BatchMaker:
    train = task.config.train
    return BatchMaker(
        source=source,
        selection=selection,
        dtype=getattr(torch, train.dtype),
        device=device,
        # Not every algorithm trains with noise.
        noise=getattr(task.config.draft, "noise", 0.0),
        seed=train.seed,
    )


def _figures(task: DraftTask, state: TrainState) -> dict[str, Any]:
    # Of the head that is saved.
    saved = state.best or state.held_out
    names = ["loss", "top1", "top2", "top3", "top10"]
    wanted = [f"{HELD_OUT}_{name}" for name in names] + [ACCEPTED_LENGTH]
    wanted += [name for name in saved if name.startswith(ACCEPTED_DEPTH)]
    held_out = {name: saved.get(name) for name in wanted}
    return {
        "steps": state.step,
        "train_tokens": state.tokens,
        "epochs": state.step / task.order.steps_per_epoch,
        "initial_loss": state.initial_loss,
        "final_loss": state.final_loss,
        **held_out,
        "head_step": state.best_step if state.best else state.step,
        "tokens_per_second": state.tokens / max(state.seconds, 1e-9),
        "seconds": state.seconds,
        "sequences": len(task.training),
        "left_out": task.training.left_out,
        "draft_vocab_size": task.vocabulary.size,
        "draft_vocab_coverage": task.coverage,
    }


def _record(task: DraftTask, run_id: str, figures: dict[str, Any]) -> dict[str, Any]:
    manifest = task.manifest
    return {
        "target_fingerprint": task.fingerprint,
        "feature_layers": list(manifest.feature_layers),
        "layer_convention": manifest.layer_convention,
        "final_norm": manifest.final_norm,
        "template_hash": manifest.template_hash,
        "training": {
            "run": run_id,
            "config": task.config.train.model_dump(mode="json"),
            **figures,
        },
    }
