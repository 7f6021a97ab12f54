"""What is found out before any worker starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from core.config import Config
from core.draft.folder import load_head, save_head
from core.errors import ConfigError, MismatchError
from core.models.tiny import save_tiny_target
from core.models.weights import load_embedding, load_output_head
from core.train.task import count_parameters, prepare
from tests.tiny_features import batch_maker, write_tiny_features


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_tiny_features(tmp_path_factory.mktemp("tiny"), examples=20, held_out=4)


@pytest.fixture(scope="module")
def eagle3_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("eagle3")
    return write_tiny_features(folder, examples=20, held_out=4, num_layers=7, layers=(2, 3, 4, 7))


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


def test_parameters_of_a_head_with_its_own_output_layer(eagle3_folders: tuple[Path, Path]) -> None:
    config = _config().replace(draft={"kind": "eagle3", "vocab_size": 30})
    task = prepare(config, str(eagle3_folders[0]), eagle3_folders[1])
    assert task.new_head().state_dict()["lm_head.weight"].shape == (30, 32)
    made = sum(parameter.numel() for parameter in task.new_head().parameters())
    assert count_parameters(config, eagle3_folders[0]) == made


def test_an_output_layer_may_begin_as_the_targets(eagle3_folders: tuple[Path, Path]) -> None:
    output_head_VH = load_output_head(eagle3_folders[0])
    for start, same in (("random", False), ("target", True)):
        draft = {"kind": "eagle3", "vocab_size": 30, "output_init": start}
        task = prepare(_config().replace(draft=draft), str(eagle3_folders[0]), eagle3_folders[1])
        head = task.first_head(output_head_VH)
        rows_WH = task.vocabulary.rows(output_head_VH).float()
        assert torch.equal(head.state_dict()["lm_head.weight"], rows_WH) is same


@pytest.fixture(scope="module")
def trained_folder(
    eagle3_folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    config = _config(seed=7).replace(draft={"kind": "eagle3", "vocab_size": 20})
    task = prepare(config, str(eagle3_folders[0]), eagle3_folders[1])
    folder = tmp_path_factory.mktemp("trained") / "head"
    record = {"target_fingerprint": task.fingerprint, "feature_layers": [2, 3, 4, 7]}
    save_head(folder, task.new_head(), record)
    return folder


def test_training_goes_on_from_a_head(
    eagle3_folders: tuple[Path, Path], trained_folder: Path
) -> None:
    config = _config().replace(draft={"kind": "eagle3", "vocab_size": 30, "step_decay": 0.5})
    task = prepare(config, str(eagle3_folders[0]), eagle3_folders[1], start=trained_folder)
    first = task.first_head(load_output_head(eagle3_folders[0])).state_dict()
    trained = load_head(trained_folder)
    assert torch.equal(task.vocabulary.d2t_W, trained.vocabulary.d2t_W)
    assert all(torch.equal(first[name], weight) for name, weight in trained.state_dict().items())
    assert not torch.equal(first["fc.weight"], task.new_head().state_dict()["fc.weight"])


def test_a_head_that_guesses_with_the_targets_output_head_takes_in_tokens(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    start = prepare(_config(), str(folders[0]), folders[1])
    record = {"target_fingerprint": start.fingerprint, "feature_layers": [2]}
    save_head(tmp_path / "head", start.new_head(), record)
    for size, expected in ((34, 34), (0, start.vocabulary.target_size), (8, 30)):
        config = _config().replace(draft={"vocab_size": size})
        task = prepare(config, str(folders[0]), folders[1], start=tmp_path / "head")
        assert task.vocabulary.size == expected
        assert set(start.vocabulary.d2t_W.tolist()) <= set(task.vocabulary.d2t_W.tolist())
        first = task.first_head(load_output_head(folders[0])).state_dict()
        assert torch.equal(first["fc.weight"], start.new_head().state_dict()["fc.weight"])


@pytest.mark.parametrize(
    ("draft", "said"),
    [
        ({"kind": "eagle1"}, r"kind is eagle3, not eagle1; set draft\.\*"),
        ({"kind": "eagle3", "qkv_bias": True}, "qkv_bias is False, not True"),
        ({"kind": "eagle3", "intermediate_size": 20}, r"intermediate_size is \d+, not 20"),
    ],
)
def test_a_head_of_another_shape_is_no_start(
    eagle3_folders: tuple[Path, Path], trained_folder: Path, draft: dict[str, Any], said: str
) -> None:
    config = _config().replace(draft=draft)
    with pytest.raises(MismatchError, match=said):
        prepare(config, str(eagle3_folders[0]), eagle3_folders[1], start=trained_folder)


def test_features_without_the_heads_layers_are_refused(folders: tuple[Path, Path]) -> None:
    config = Config().replace(draft={"kind": "eagle3"}, train={"global_batch_size": 8})
    said = (
        r"draft\.kind=eagle3 reads 3 states .* these features are layers \[2\]; extract them with "
        r"features\.layers=eagle3"
    )
    with pytest.raises(ConfigError, match=said):
        prepare(config, str(folders[0]), folders[1])


def test_a_head_of_the_final_feature_takes_any_layers(eagle3_folders: tuple[Path, Path]) -> None:
    task = prepare(_config(), str(eagle3_folders[0]), eagle3_folders[1])
    head = task.new_head()
    head.attach_target(load_embedding(eagle3_folders[0]), load_output_head(eagle3_folders[0]))
    batch = batch_maker(task).batch(np.arange(4), 0)
    assert batch.features_BTLH.shape[2] == 4
    assert bool(torch.isfinite(head.losses(batch).loss))


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
