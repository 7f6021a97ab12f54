"""train_draft with streamed features: the curve and the head of training from shards."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch

from core.config import Config
from core.data.examples import (
    SPLITS,
    Example,
    ExampleMetadata,
    example_shards,
    read_examples,
    shard_name,
    write_examples,
)
from core.data.feature_shards import FeatureDataset
from core.data.template import template_hash, tokenizer_hash
from core.draft.folder import load_head
from core.errors import InputError, ResourceError, StageError
from core.models.features import extract_shard
from core.models.target import load_target
from core.models.tiny import byte_tokenizer, save_tiny_target
from core.runtime.extraction import plan_manifest
from core.runtime.job import run_stage
from core.runtime.streaming import FeatureStream, feature_stream, received
from core.tracking import read_metrics
from core.train.batches import BatchMaker
from core.train.loop import MEASURED
from core.train.order import FeatureSource, Selection
from core.train.task import DraftTask, open_shards, prepare
from jobs import train_draft

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

PATIENCE_SECONDS = 240
LONGEST = 40
# Two layers in float32, summed in another order: a few units in the last place.
RELATIVE, ABSOLUTE = 1e-4, 1e-5


@pytest.fixture(scope="module", autouse=True)
def four_cpus() -> Iterator[None]:
    """Room for two training workers and two replicas at the same time."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=100_000_000)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("streaming")
    save_tiny_target(folder / "target")
    for split, shards in (("train", 3), ("held_out", 1)):
        _write_split(folder / "examples", split, shards)
    return Config().replace(
        target={"path": str(folder / "target"), "dtype": "float32"},
        data={"examples": str(folder / "examples")},
        features={"path": str(folder / "features"), "dtype": "float32", "batch_tokens": 256},
        draft={"vocab_size": 40},
        train={
            "num_workers": 2,
            "global_batch_size": 8,
            "micro_batch_size": 3,
            "max_length": 32,
            "lr": 0.003,
            "warmup_steps": 10,
            "epochs": 25,
            "eval_every": 50,
            "checkpoint_every": 20,
        },
    )


def _write_split(folder: Path, split: str, shards: int) -> None:
    generator = np.random.default_rng(shards)
    tokenizer = byte_tokenizer()
    hashes = tokenizer_hash(tokenizer), template_hash(tokenizer)
    metadata = ExampleMetadata(split, *hashes, max_length=LONGEST, cleaning={})
    for number in range(shards):
        examples = []
        for i in range(14):
            length = int(generator.integers(8, LONGEST + 1))
            ids = generator.integers(3, 60, length, dtype=np.int32)
            mask = (np.arange(length) >= length // 2).astype(np.uint8)
            examples.append(Example(f"{number}-{i}", ids, mask, "made", 2))
        write_examples(folder / split / shard_name(number), examples, metadata)


@pytest.fixture(scope="module")
def features(config: Config) -> Path:
    """The same features in shards, by the loop that a replica of extract_features runs."""
    folder, examples = Path(str(config.features.path)), Path(str(config.data.examples))
    manifest = plan_manifest(config, examples, Path(str(config.target.path)))
    target = load_target(config.target, num_threads=1)
    for split in SPLITS:
        for source in example_shards(examples, split):
            shard = folder / split / f"{source.stem}.safetensors"
            extract_shard(
                target, read_examples(source), shard, manifest, config.features.batch_tokens
            )
    manifest.write(folder)
    return folder


def _streamed(config: Config, **features: Any) -> Config:
    return config.replace(features={"mode": "stream", "path": None, **features})


def _streamed_task(config: Config) -> DraftTask:
    examples, target = Path(str(config.data.examples)), Path(str(config.target.path))
    return prepare(config, str(target), examples, plan_manifest(config, examples, target))


def _last_step(folder: Path) -> int:
    return max((record["step"] for record in read_metrics(folder)), default=0)


def _processes(name: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        # It may end while it is looked at.
        with contextlib.suppress(psutil.NoSuchProcess):
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


def _end(name: str) -> None:
    """Wait until there is no such process."""
    deadline = time.monotonic() + 30
    while _processes(name):
        assert time.monotonic() < deadline, f"{name} outlives the run"
        time.sleep(0.1)


class _Killer(threading.Thread):
    """Kills one process of each name as soon as the run has passed the step beside it."""

    def __init__(self, folder: Path, plan: list[tuple[int, str]]) -> None:
        super().__init__(daemon=True)
        self.folder, self.plan = folder, plan
        self.killed: list[str] = []
        self.start()

    def run(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        for step, name in self.plan:
            while _last_step(self.folder) < step and time.monotonic() < deadline:
                time.sleep(0.02)
            os.kill(min(process.pid for process in _processes(name)), signal.SIGKILL)
            self.killed.append(name)


@pytest.mark.soak
def test_streamed_training_is_that_from_shards_whatever_is_killed(
    config: Config, features: Path, tmp_path: Path
) -> None:
    """A replica is lost on the way, and then a training worker, which goes on in mid-stream."""
    stored, streamed = tmp_path / "stored", tmp_path / "streamed"
    from_shards = dict(run_stage(train_draft.JOB, config.replace(output=str(stored))))
    killer = _Killer(streamed, [(20, "FeatureReplica"), (70, "RayTrainWorker")])
    report = dict(run_stage(train_draft.JOB, _streamed(config).replace(output=str(streamed))))
    killer.join(timeout=10)
    assert killer.killed == ["FeatureReplica", "RayTrainWorker"]
    _end("FeatureReplica")
    holders = {path.parent.name.partition("-")[0] for path in streamed.rglob("*.safetensors")}
    assert holders == {"head", "step"}, "features on disk, beside head and checkpoints"

    curves = [
        [{k: v for k, v in r.items() if k not in MEASURED} for r in records]
        for records in (read_metrics(stored), read_metrics(streamed))
    ]
    assert len(curves[0]) == len(curves[1]) > 12
    for wanted, found in zip(*curves, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5), wanted["step"]
    exact = ("steps", "train_tokens", "sequences", "draft_vocab_size", "draft_vocab_coverage")
    assert {name: report[name] for name in exact} == {name: from_shards[name] for name in exact}
    assert report["final_loss"] < 0.8 * report["initial_loss"]

    heads = [load_head(folder / "head") for folder in (stored, streamed)]
    assert torch.equal(heads[0].vocabulary.d2t_W, heads[1].vocabulary.d2t_W)
    for name, wanted in heads[0].state_dict().items():
        torch.testing.assert_close(heads[1].state_dict()[name], wanted, rtol=1e-4, atol=1e-5)


def test_a_target_that_cannot_be_loaded_is_the_users_error(config: Config, tmp_path: Path) -> None:
    save_tiny_target(tmp_path / "target")
    config = _streamed(config, num_replicas=1).replace(target={"path": str(tmp_path / "target")})
    task = _streamed_task(config)
    (tmp_path / "target" / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json in that folder"):
        with feature_stream(task):
            pass
    _end("FeatureReplica")


AHEAD = 2


@pytest.fixture(scope="module")
def running(config: Config) -> Iterator[tuple[DraftTask, FeatureStream]]:
    """A stream of two replicas, as training workers get it."""
    task = _streamed_task(_streamed(config, stream_ahead=AHEAD, num_replicas=2))
    with feature_stream(task) as stream:
        yield task, stream


def _served(stream: FeatureStream) -> int:
    # A replica answers in order: the count covers all that this process has asked for.
    return sum(received(replica.served.remote()) for replica in stream.replicas)


def _maker(source: FeatureSource, selection: Selection) -> BatchMaker:
    return BatchMaker(source, selection, torch.float32, torch.device("cpu"))


def test_the_stream_gives_what_the_shards_hold_and_no_more_than_is_asked_for(
    running: tuple[DraftTask, FeatureStream], features: Path
) -> None:
    task, stream = running
    before = _served(stream)
    maker = _maker(stream.open(task, "train", rank=0), task.training)
    stored = _maker(FeatureDataset(features, "train"), task.training)
    passes = list(task.order.passes(3, rank=0, world_size=2, micro_batch_size=3))
    maker.announce(passes)
    for taken, rows in enumerate(passes[:6], start=1):
        batch, wanted = maker.batch(rows), stored.batch(rows)
        assert torch.equal(batch.input_ids_BT, wanted.input_ids_BT)
        assert torch.equal(batch.loss_mask_BT, wanted.loss_mask_BT)
        torch.testing.assert_close(
            batch.features_BTLH, wanted.features_BTLH, rtol=RELATIVE, atol=ABSOLUTE
        )
        assert _served(stream) - before == taken + AHEAD, "back-pressure: more than was asked for"


def test_kept_held_out_features_are_not_computed_again(
    running: tuple[DraftTask, FeatureStream],
) -> None:
    task, stream = running
    assert task.held_out is not None
    rows = [np.arange(0, 7), np.arange(7, 14)]
    before = _served(stream)
    source = stream.open(task, "held_out", rank=0)
    source._keep_bytes = 30_000  # the first pass fits, the second does not
    maker = _maker(source, task.held_out)
    seen = []
    for _ in range(3):
        maker.announce(rows)
        seen.append([maker.batch(r).features_BTLH for r in rows])
    assert _served(stream) - before == 1 + 3
    for again in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, seen[0], strict=True))


def test_a_replicas_error_is_one_message_and_is_remembered(
    running: tuple[DraftTask, FeatureStream],
) -> None:
    _, stream = running
    assert stream.failure() is None
    wrong = np.full(9, 10**6, dtype=np.int32)
    with pytest.raises(StageError, match=r"^a target replica failed: IndexError: [^\n]*$"):
        received(stream.replicas[1].features.remote([wrong]))
    assert "IndexError" in str(stream.failure())


def test_too_little_room_is_said_before_anything_starts(config: Config, tmp_path: Path) -> None:
    crowded = _streamed(config, num_replicas=3).replace(output=str(tmp_path / "out"))
    with pytest.raises(ResourceError, match=r"needs 5 CPUs .*features\.num_replicas.*, 4 are"):
        run_stage(train_draft.JOB, crowded)
    task = _streamed_task(_streamed(config, stream_ahead=10**6))
    with pytest.raises(ResourceError, match=r"lower features\.stream_ahead=1000000"):
        with feature_stream(task):
            pass


def test_both_kinds_open_the_same_examples(config: Config, features: Path) -> None:
    task = _streamed_task(_streamed(config))
    stored = prepare(config, str(config.target.path), features)
    for name in ("indices_N", "lengths_N", "supervised_N"):
        assert np.array_equal(getattr(task.training, name), getattr(stored.training, name))
    assert task.coverage == stored.coverage
    assert len(open_shards(stored, "held_out")) == 14
