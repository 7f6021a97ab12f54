"""Fine-tuning's task: what is found out before any worker starts, and a short run of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.config import Config
from core.errors import ConfigError, InputError, MismatchError
from core.models.target import target_fingerprint
from core.provenance import RunFolder
from core.runtime.finetuning import finetune_target
from core.tracking import read_metrics
from core.train.engine import build_engine
from core.train.finetune import FinetuneTask, finetune, prepare_finetuning
from jobs import prepare_data
from jobs.finetune_target import JOB
from tests.folder_host import FolderHost
from tests.tiny_targets import save_tiny, write_tiny_examples

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_examples(
        tmp_path_factory.mktemp("data") / "examples", examples=20, held_out=4
    )


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("target") / "model", "llama")


def _config(finetune: dict[str, Any] | None = None, **train: Any) -> Config:
    settings = {
        "num_workers": 1,
        "global_batch_size": 5,
        "micro_batch_size": 2,
        "max_length": 20,
        "lr": 3e-3,
        "warmup_steps": 2,
        "epochs": 3,
        "eval_every": 4,
        "checkpoint_every": 4,
        **train,
    }
    return Config().replace(train=settings, finetune=finetune or {}, tracking={"wandb": "disabled"})


def _task(target: Path, examples: Path, **settings: Any) -> FinetuneTask:
    return prepare_finetuning(_config(**settings), str(target), examples)


def test_what_is_supervised_is_what_somebody_predicts(target: Path, examples: Path) -> None:
    task = _task(target, examples)
    batches = task.batches("train", CPU)
    for row in range(len(task.training)):
        batch = batches.batch(torch.tensor([row]).numpy())
        assert int((batch.labels_BT >= 0).sum()) == task.training.supervised_N[row]
    assert task.parameters == task.trained_parameters
    assert task.held_out is not None and len(task.held_out) == 4


def test_examples_of_another_tokenizer_are_refused(
    target: Path, examples: Path, tmp_path: Path, smollm2_tokenizer: Any
) -> None:
    other = save_tiny(tmp_path / "other", "llama")
    smollm2_tokenizer.save_pretrained(other)
    with pytest.raises(MismatchError, match="made with another tokenizer"):
        _task(other, examples)


def test_what_does_not_fit_the_model_is_refused(examples: Path, tmp_path: Path) -> None:
    bloom = save_tiny(tmp_path / "bloom", "bloom")
    with pytest.raises(ConfigError, match=r"type bloom takes no position ids.*packing=false"):
        _task(bloom, examples)
    assert _task(bloom, examples, finetune={"packing": False}).parameters > 0
    short = save_tiny(tmp_path / "short", "llama", max_position_embeddings=12)
    with pytest.raises(ConfigError, match=r"train\.max_length=20: the target takes .* up to 12"):
        _task(short, examples)
    assert _task(short, examples, max_length=12).order.total_steps > 0
    with pytest.raises(ConfigError, match=r"finetune\.target_modules=\['nothing'\]"):
        _task(short, examples, finetune={"method": "lora", "target_modules": ["nothing"]})


def test_inputs_are_named_when_they_are_missing(target: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"target\.path is not set.*convert\.source"):
        JOB.inputs(Config())
    there = Config().replace(target={"path": str(target)})
    with pytest.raises(ConfigError, match=r"data\.examples is not set.*data\.path"):
        JOB.inputs(there)
    with pytest.raises(InputError, match=r"data\.examples=.*none"):
        JOB.inputs(there.replace(data={"examples": str(tmp_path / "none")}))


def test_what_is_made_on_the_way_counts(target: Path, examples: Path) -> None:
    assert JOB.counted is not None
    made = Config().replace(convert={"source": "tiny-random"}, data={"path": "chats.json"})
    assert JOB.counted(made) == ("convert", "target.template", "data", "finetune", "train")
    given = Config().replace(target={"path": str(target)}, data={"examples": str(examples)})
    assert JOB.counted(given) == ("finetune", "train")
    needs = JOB.resources(given.replace(train={"num_workers": 4, "global_batch_size": 4}))
    assert needs.cpus == 4 and 0 < needs.disk_gb < 0.1


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("parallelism", ["ddp", "zero2"])
def test_rotary_frequencies_stay_exact_in_bfloat16(
    target: Path, examples: Path, parallelism: str
) -> None:
    task = _task(target, examples, dtype="bfloat16", parallelism=parallelism)
    wanted = dict(task.new_trainee(CPU).model.named_buffers())
    engine = build_engine(task.new_trainee(CPU), task.config.train, CPU)
    found = dict(engine.module.model.named_buffers())  # type: ignore[union-attr]
    assert wanted and all(torch.equal(found[name], buffer) for name, buffer in wanted.items())
    assert all(buffer.dtype == torch.float32 for buffer in found.values())
    batch = task.batches("train", CPU).batch(torch.arange(3).numpy(), 0)
    loss, count, _ = engine.accumulate(batch, 10, last=True).tolist()
    assert 0 < loss / count < 10
    assert engine.step(1e-3) > 0


def test_a_bad_target_is_refused_before_conversations_are_prepared(
    target: Path, tmp_path: Path
) -> None:
    """What comes first would take an hour, and here would end with another error."""
    cut_off = save_tiny(tmp_path / "model", "llama")
    file = cut_off / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    parts = {"parallelism": "pipeline", "num_workers": 2, "parts": (9, 9)}
    cases: tuple[tuple[Path, dict[str, Any], type[Exception], str], ...] = (
        (target, parts, ConfigError, "adds up to 18, the model has 4 blocks"),
        (cut_off, {}, InputError, r"model\.safetensors cannot be read"),
    )
    for folder, train, error, said in cases:
        config = _config(**train).replace(
            output=str(tmp_path / "out"),
            target={"path": str(folder)},
            data={"path": str(tmp_path / "none.json")},
        )
        with pytest.raises(error, match=said):
            finetune_target(config, RunFolder(JOB.name, config, (), {}), prepare_data.JOB)


def test_a_pipeline_that_does_not_divide_the_model_is_refused(
    examples: Path, tmp_path: Path
) -> None:
    """By its config and the model's, before any worker starts."""
    target = save_tiny(tmp_path / "model", "llama")
    pipeline: dict[str, Any] = {"parallelism": "pipeline", "num_workers": 2}
    task = _task(target, examples, **pipeline, parts=(1, 3))
    assert task.trained_parameters == task.parameters
    for settings, said in (
        ({"parts": (2, 3)}, "adds up to 5, the model has 4 blocks"),
        ({"parts": (4,)}, "names 1 stages, train.pipeline_stages=2"),
        ({"pipeline_stages": 5, "num_workers": 5}, "the model has only 4 blocks"),
        ({"stage_memory_gib": 1e-5}, "no division of the model .* fits into 0.0 GiB a worker"),
    ):
        with pytest.raises(ConfigError, match=said):
            _task(target, examples, **{**pipeline, **settings})
    lora = {**pipeline, "finetune": {"method": "lora"}}
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"parts": (1, 3)}, "a stage without a layer, and so without adapters"),
        ({"pipeline_stages": 3, "num_workers": 3}, "the model has only 2 layers"),
        ({"finetune": {"method": "lora", "target_modules": ["nothing"]}}, "called nothing, but"),
    )
    for changes, said in cases:
        with pytest.raises(ConfigError, match=said):
            _task(target, examples, **{**lora, **changes, "global_batch_size": 6})
    assert _task(target, examples, **lora).trained_parameters < task.parameters


@pytest.mark.usefixtures("process_group")
def test_a_run_leaves_a_model_that_is_better_and_says_so(
    target: Path, examples: Path, tmp_path: Path
) -> None:
    task = _task(target, examples, lr=0.01, epochs=10, parallelism="zero1")
    figures = finetune(task, tmp_path, "run", FolderHost(tmp_path / "kept"), CPU)
    assert figures["final_loss"] < 0.9 * figures["initial_loss"]
    first = read_metrics(tmp_path)[0]
    assert first["step"] == 0 and first["held_out_loss"] == figures["held_out_loss_before"]
    evaluations = [r["held_out_loss"] for r in read_metrics(tmp_path) if "held_out_loss" in r]
    # The best of those behind the first step.
    assert figures["held_out_loss"] == min(evaluations[1:])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    kept = load_file(sorted((tmp_path / "kept").glob("step-*"))[-1] / "best.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.detach(), kept[name]), name
    assert target_fingerprint(tmp_path / "model") != task.fingerprint
    tokenizer, before = (AutoTokenizer.from_pretrained(f) for f in (tmp_path / "model", target))
    assert tokenizer.chat_template == before.chat_template
    assert tokenizer("some text").input_ids == before("some text").input_ids


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("parallelism", ["ddp", "zero2", "zero3", "pipeline"])
def test_a_damaged_checkpoint_is_refused_before_training_starts(
    target: Path, examples: Path, tmp_path: Path, parallelism: str
) -> None:
    """Each of its files, and that of another method."""
    settings: dict[str, Any] = {"parallelism": parallelism}
    if parallelism == "pipeline":
        settings |= {"pipeline_stages": 1}
    task, host = _task(target, examples, **settings), FolderHost(tmp_path / "kept", stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        finetune(task, tmp_path, "run", host, CPU)
    before = read_metrics(tmp_path)
    (kept,) = (tmp_path / "kept").iterdir()
    for file in kept.iterdir():
        whole = file.read_bytes()
        for cut in (len(whole) // 2, 5):
            file.write_bytes(whole[:cut])
            with pytest.raises(InputError, match=rf"{file.name} cannot be read .* is damaged") as e:
                finetune(task, tmp_path, "run", host, CPU)
            assert f"remove {kept} to go on" in str(e.value)
        file.write_bytes(whole)
    lora = _task(target, examples, **settings, finetune={"method": "lora"})
    with pytest.raises(InputError, match="of another model, method or optimizer"):
        finetune(lora, tmp_path, "run", host, CPU)
    assert read_metrics(tmp_path) == before
