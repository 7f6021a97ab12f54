"""Two workers against one: the same step, and a run that changes their number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from core.config import Config
from core.draft.folder import load_head, read_record
from core.models.weights import load_embedding, load_output_head
from core.tracking import read_metrics
from core.train.draft import DraftTrainee
from core.train.engine import FILE, build_engine
from core.train.schedule import learning_rate
from core.train.task import DraftTask, prepare, train
from tests.folder_host import FolderHost
from tests.tiny_features import batch_maker, write_tiny_features
from tests.two_workers import TwoWorkers

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("process_group")]

CPU = torch.device("cpu")
PARALLELISM = ("ddp", "zero0", "zero1", "zero2", "zero3")
KINDS = ("eagle1", "eagle3")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoWorkers]:
    with TwoWorkers(tmp_path_factory.mktemp("pair")) as workers:
        yield workers


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    # As either head reads them.
    folder = tmp_path_factory.mktemp("tiny")
    return write_tiny_features(folder, examples=40, held_out=12, num_layers=7, layers=(2, 3, 4, 7))


def _task(folders: tuple[Path, Path], kind: str = "eagle1", **settings: Any) -> DraftTask:
    train_settings = {
        "num_workers": 2,
        "global_batch_size": 8,
        "micro_batch_size": 3,
        "max_length": 24,
        "lr": 5e-3,
        "warmup_steps": 2,
        "epochs": 3,
        "eval_every": 4,
        "checkpoint_every": 3,
        "clip": 0.1,
        "ema": 0.8,
        **settings,
    }
    config = Config.model_validate(
        {
            "train": train_settings,
            "draft": {"kind": kind, "vocab_size": 40},
            "tracking": {"wandb": "disabled"},
        }
    )
    return prepare(config, str(folders[0]), folders[1])


def one_step(rank: int, task: DraftTask, folder: Path) -> list[float]:
    """One optimizer step from the start, saved; this worker's sum of statistics."""
    embedding, output_head = load_embedding(Path(task.target)), load_output_head(Path(task.target))
    trainee = DraftTrainee(task.new_head(), embedding, output_head)
    engine = build_engine(trainee, task.config.train, CPU)
    maker, size = batch_maker(task), task.config.train.micro_batch_size
    passes = task.order.micro_batches(0, rank, engine.world_size, size)
    sums = torch.stack(
        [
            engine.accumulate(maker.batch(rows, 0), task.order.supervised(0), last=i == len(passes))
            for i, rows in enumerate(passes, start=1)
        ]
    ).sum(0)
    engine.step(learning_rate(0, task.order.total_steps, task.config.train))
    engine.save(folder)
    return sums.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_two_workers_is_that_of_one(
    pair: TwoWorkers, folders: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    """Loss, every gradient (AdamW's first moment after one step) and every weight."""
    for folder in ("one", *PARALLELISM):
        (tmp_path / folder).mkdir()
    alone = one_step(0, _task(folders, kind, parallelism="ddp", num_workers=1), tmp_path / "one")
    wanted = load_file(tmp_path / "one" / FILE)
    start = _task(folders, kind).new_head().state_dict()
    for parallelism in PARALLELISM:
        task = _task(folders, kind, parallelism=parallelism)
        parts = pair(one_step, task, tmp_path / parallelism)
        total = [sum(values) for values in zip(*parts, strict=True)]
        assert total == pytest.approx(alone, rel=1e-5), parallelism
        found = load_file(tmp_path / parallelism / FILE)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert bool((tensor != 0).any()), name
            torch.testing.assert_close(
                found[name], tensor, rtol=1e-3, atol=1e-6, msg=f"{parallelism} {name}"
            )
            if name.startswith("weights/"):
                assert not torch.equal(tensor, start[name.removeprefix("weights/")]), name


def run(rank: int, task: DraftTask, output: Path, kept: Path, stop_after: int | None) -> Any:
    """A run, from the last checkpoint if there is one; None if it was stopped."""
    world_size = torch.distributed.get_world_size()
    host = FolderHost(kept, stop_after, rank, world_size)
    try:
        return train(task, output, "run", host, CPU)
    except KeyboardInterrupt:
        return None


@pytest.mark.parametrize(
    ("parallelism", "dtype", "tolerance"),
    [("zero1", "float32", 1e-4), ("ddp", "float32", 1e-4), ("zero2", "bfloat16", 0.02)],
)
def test_a_run_goes_on_with_another_number_of_workers(
    pair: TwoWorkers,
    folders: tuple[Path, Path],
    tmp_path: Path,
    parallelism: str,
    dtype: str,
    tolerance: float,
) -> None:
    """Two workers, then one, then two again, each from the other's checkpoint."""
    settings = {"parallelism": parallelism, "dtype": dtype}
    two, one = (_task(folders, num_workers=number, **settings) for number in (2, 1))
    assert two.config.identity(["train"]) == one.config.identity(["train"])
    undisturbed, changed = tmp_path / "undisturbed", tmp_path / "changed"
    whole, _ = pair(run, two, undisturbed, undisturbed / "kept", None)
    assert whole["steps"] == 15
    kept = changed / "kept"
    assert pair(run, two, changed, kept, 6) == [None, None]
    assert run(0, one, changed, kept, 9) is None
    figures, _ = pair(run, two, changed, kept, None)

    assert figures["train_tokens"] == whole["train_tokens"]
    assert figures["final_loss"] == pytest.approx(whole["final_loss"], rel=tolerance)
    for record, undone in zip(read_metrics(changed), read_metrics(undisturbed), strict=True):
        assert record["step"] == undone["step"]
        assert record["tokens"] == undone["tokens"]
        name = "loss" if "loss" in record else "held_out_loss"
        assert record[name] == pytest.approx(undone[name], rel=tolerance)
    found, wanted = (load_head(folder / "head") for folder in (changed, undisturbed))
    for name, tensor in wanted.state_dict().items():
        torch.testing.assert_close(
            found.state_dict()[name], tensor, rtol=tolerance, atol=tolerance / 10, msg=name
        )


def test_two_workers_keep_the_best_head(
    pair: TwoWorkers, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """The saved head is that of the evaluation with the largest accepted length."""
    # So large a rate that training makes things worse after a while, and not so large that
    # rounding decides when.
    task = _task(
        folders,
        lr=0.03,
        schedule="constant",
        epochs=12,
        ema=0.0,
        parallelism="zero3",
        accepted_depth=1,
    )
    figures, same = pair(run, task, tmp_path, tmp_path / "kept", None)
    assert figures["head_step"] == same["head_step"]
    evaluations = [r for r in read_metrics(tmp_path) if "held_out_accepted_length" in r]
    best = max(evaluations, key=lambda record: (record["held_out_accepted_length"], record["step"]))
    lengths = [record["held_out_accepted_length"] for record in evaluations]
    assert lengths.count(max(lengths)) == 1 < len(set(lengths)), "one must be better than the rest"
    assert best["step"] < figures["steps"], "the last is the best, so that nothing is chosen"
    assert figures["head_step"] == best["step"]
    assert read_record(tmp_path / "head")["training"]["head_step"] == best["step"]
    for name in ("held_out_accepted_length", "held_out_accepted_depth_1", "held_out_loss"):
        assert figures[name] == best[name]
    head = load_head(tmp_path / "head")
    head.attach_target(load_embedding(Path(task.target)), load_output_head(Path(task.target)))
    maker = batch_maker(task, held_out=True)
    assert task.held_out is not None
    with torch.no_grad():
        sums = head.eval().losses(maker.batch(torch.arange(len(task.held_out)).numpy()))
    mean = float(sums.loss) / int(sums.num_tokens)
    assert mean == pytest.approx(best["held_out_loss"], rel=1e-5)
