"""What is found out before any worker starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from core.config import Config
from core.errors import ConfigError, MismatchError
from core.models.tiny import save_tiny_target
from core.train.task import count_parameters, prepare
from tests.tiny_features import write_tiny_features


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_tiny_features(tmp_path_factory.mktemp("tiny"), examples=20, held_out=4)


def _config(**train: Any) -> Config:
    return Config().replace(
        draft={"vocab_size": 30}, train={"global_batch_size": 8, "max_length": 24, **train}
    )


def test_a_task_is_made_from_config_and_inputs_alone(folders: tuple[Path, Path]) -> None:
    task, again = (prepare(_config(), str(folders[0]), folders[1]) for _ in range(2))
    assert torch.equal(task.vocabulary.d2t_W, again.vocabulary.d2t_W)
    assert task.vocabulary.size == 30
    assert 0.5 < task.coverage < 1.0
    assert len(task.training) == 20
    assert task.held_out is not None
    assert len(task.held_out) == 4
    assert task.order.total_steps == 2 * task.config.train.epochs
    weights, same = task.new_head().state_dict(), again.new_head().state_dict()
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_parameters_are_counted_without_making_them(folders: tuple[Path, Path]) -> None:
    task = prepare(_config(), str(folders[0]), folders[1])
    made = sum(parameter.numel() for parameter in task.new_head().parameters())
    assert count_parameters(_config(), folders[0]) == made


def test_vocabulary_size_0_takes_all_tokens(folders: tuple[Path, Path]) -> None:
    task = prepare(_config().replace(draft={"vocab_size": 0}), str(folders[0]), folders[1])
    assert task.vocabulary.is_whole
    assert task.coverage == 1.0


def test_features_of_another_target_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    save_tiny_target(tmp_path / "other", seed=1)
    with pytest.raises(MismatchError, match="come from the target"):
        prepare(_config(), str(tmp_path / "other"), folders[1])


def test_fewer_sequences_than_a_batch(folders: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch_size=22 .* only 20"):
        prepare(_config(global_batch_size=22), str(folders[0]), folders[1])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"parallelism": "zero0", "dtype": "bfloat16"}, r"add up gradients in bfloat16; choose"),
        ({"parallelism": "zero1", "dtype": "float16"}, r"no float16 on CPU; choose train\.dtype="),
        ({"num_workers": 3, "global_batch_size": 8}, r"not a multiple of train\.num_workers=3"),
    ],
)
def test_settings_that_exclude_each_other(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        _config(**settings)


def test_float16_has_its_places() -> None:
    assert _config(parallelism="ddp", dtype="float16").train.dtype == "float16"
    assert _config(dtype="float16", gpus_per_worker=1).train.dtype == "float16"


def test_how_the_work_is_divided_is_no_part_of_a_runs_identity() -> None:
    wanted = _config().identity(["train"])
    for change in ({"num_workers": 4}, {"micro_batch_size": 1}, {"gradient_checkpointing": True}):
        assert _config(**change).identity(["train"]) == wanted
    assert _config(keep="last").identity(["train"]) != wanted


def test_features_without_held_out_split_train_without_evaluation(tmp_path: Path) -> None:
    target, features = write_tiny_features(tmp_path, examples=8)
    assert prepare(_config(), str(target), features).held_out is None
