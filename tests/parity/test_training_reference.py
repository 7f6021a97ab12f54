"""The benchmark's plain form of EAGLE's training step, and its comparison of the two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from core.config import Config
from core.errors import ConfigError, InputError
from core.models.weights import load_embedding, load_output_head
from core.provenance import RunFolder
from core.runtime import benchmark
from core.runtime.training_benchmark import REFERENCES
from core.train.task import prepare
from tests.tiny_features import batch_maker, write_tiny_features


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return write_tiny_features(folder, examples=24, num_layers=7, layers=(2, 3, 4, 7))


def _config(folders: tuple[Path, Path], kind: str, vocab_size: int, **train: Any) -> Config:
    settings = {
        "num_workers": 1,
        "global_batch_size": 6,
        "micro_batch_size": 3,
        "max_length": 24,
        "lr": 1e-3,
        "warmup_steps": 1,
        **train,
    }
    return Config.model_validate(
        {
            "target": {"path": str(folders[0])},
            "features": {"path": str(folders[1])},
            "draft": {"kind": kind, "vocab_size": vocab_size},
            "train": settings,
            "benchmark": {"name": "training", "repeats": 1, "max_tokens": 400},
        }
    )


@pytest.mark.parametrize(("kind", "vocab_size"), [("eagle1", 0), ("eagle3", 40)])
def test_the_references_loss_and_gradients_are_the_heads(
    folders: tuple[Path, Path], kind: str, vocab_size: int
) -> None:
    config = _config(folders, kind, vocab_size)
    task = prepare(config, str(folders[0]), folders[1])
    tensors = load_embedding(folders[0]), load_output_head(folders[0])
    head = task.new_head().train()
    head.attach_target(*tensors)
    batch = batch_maker(task).batch(task.order.global_batch(0), 0)
    mine = head.losses(batch)
    mean = mine.loss / mine.num_tokens
    theirs = REFERENCES[kind](head, *tensors, batch)
    torch.testing.assert_close(mean, theirs, rtol=1e-4, atol=1e-6)
    parameters = list(head.parameters())
    pairs = zip(
        torch.autograd.grad(mean, parameters), torch.autograd.grad(theirs, parameters), strict=True
    )
    for found, wanted in pairs:
        assert bool((wanted != 0).any())
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("parallelism", ["ddp", "zero1"])
def test_the_benchmark_trains_the_same_in_every_way(
    folders: tuple[Path, Path], tmp_path: Path, parallelism: str
) -> None:
    config = _config(folders, "eagle1", 40, parallelism=parallelism).replace(output=str(tmp_path))
    folder = RunFolder("benchmark", config, benchmark.sections(config), benchmark.inputs(config))
    threads = torch.get_num_threads()
    report = benchmark.run(config, folder)
    torch.set_num_threads(threads)
    assert report["steps"] >= 2
    assert report["supervised"] < report["tokens"] <= 400
    assert report["padding"]["sorted"] <= report["padding"]["in_order"]
    ways = report["ways"]
    assert set(ways) == {"reference", "aerie", "aerie_whole_vocabulary"}
    for loss in ("first_loss", "last_loss"):
        assert report["ratios"][loss]["median"] == pytest.approx(1.0, abs=1e-3)
    speeds = [name for name in report["ratios"] if name.startswith("speed")]
    assert speeds == ["speed_at_equal_loss", "speed_with_draft_vocabulary"]
    assert report["ratios"]["speed_at_equal_loss"]["at_least"] == 2.0
    assert ways["aerie"]["first_loss"]["median"] != ways["reference"]["first_loss"]["median"]
    assert all(way["tokens_per_second"]["min"] > 0 for way in ways.values())


@pytest.mark.usefixtures("process_group")
def test_too_little_to_train_on_is_said(folders: tuple[Path, Path], tmp_path: Path) -> None:
    config = _config(folders, "eagle1", 40).replace(
        output=str(tmp_path), benchmark={"max_tokens": 256}, train={"global_batch_size": 12}
    )
    folder = RunFolder("benchmark", config, ("train",), {})
    with pytest.raises(InputError, match="fewer than two steps of 12 sequences"):
        benchmark.run(config, folder)
    with pytest.raises(ConfigError, match=r"features\.path is not set"):
        benchmark.inputs(config.replace(features={"path": None}))
