"""Fine-tuning by two and by four workers against a plain loop in one process, for every
architecture with its embedding tied to the head and apart from it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from core.config import Config
from core.tracking import read_metrics
from core.train.finetune import FinetuneTask, finetune, prepare_finetuning
from core.train.loop import MEASURED
from tests.folder_host import FolderHost
from tests.plain_finetuning import decided, plain
from tests.tiny_targets import save_tiny, write_tiny_examples
from tests.two_workers import FourWorkers, TwoWorkers

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("process_group")]

CPU = torch.device("cpu")
DIVISIONS: tuple[dict[str, Any], ...] = (
    {"parallelism": "ddp"},
    {"parallelism": "zero1"},
    {"parallelism": "zero2"},
    {"parallelism": "zero3"},
)
# Where state is, and who sends it, concerns the engine, whatever the model.
MORE_DIVISIONS: tuple[dict[str, Any], ...] = (
    {"parallelism": "zero2", "offload": "optimizer"},
    {"parallelism": "zero3", "offload": "all"},
)
MODELS = tuple(itertools.product(("llama", "bloom", "mixtral", "qwen3", "gpt2"), (True, False)))
# Four workers of two CPUs take their time: two models are enough for every day.
FOUR_EVERY_DAY = (("llama", True), ("gpt2", False))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoWorkers]:
    with TwoWorkers(tmp_path_factory.mktemp("pair")) as workers:
        yield workers


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FourWorkers]:
    with FourWorkers(tmp_path_factory.mktemp("four")) as workers:
        yield workers


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoWorkers]:
    """For pipelines alone: DeepSpeed's other engines cannot follow one in a process."""
    with TwoWorkers(tmp_path_factory.mktemp("staged")) as workers:
        yield workers


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_examples(
        tmp_path_factory.mktemp("data") / "examples", examples=26, held_out=5
    )


def _task(target: Path, examples: Path, *, packing: bool = True, **settings: Any) -> FinetuneTask:
    train = {
        "num_workers": 2,
        "global_batch_size": 8,
        "micro_batch_size": 3,
        "max_length": 20,
        "lr": 5e-3,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "epochs": 2,
        "clip": 0.5,
        "eval_every": 100,
        "checkpoint_every": 100,
        "keep": "last",
        **{name: value for name, value in settings.items() if name != "finetune"},
    }
    config = Config.model_validate(
        {
            "train": train,
            "finetune": {"packing": packing, "rank": 4, **settings.get("finetune", {})},
            "tracking": {"wandb": "disabled"},
        }
    )
    return prepare_finetuning(config, str(target), examples)


def run(
    rank: int, task: FinetuneTask, output: Path, kept: Path, stop_after: int | None = None
) -> dict[str, Any] | None:
    """A run, from the last checkpoint if there is one; None if it was stopped."""
    import core.train.loop

    before, core.train.loop.LOG_EVERY = core.train.loop.LOG_EVERY, 1
    host = FolderHost(kept, stop_after, rank, torch.distributed.get_world_size())
    try:
        return finetune(task, output, "run", host, CPU)
    except KeyboardInterrupt:
        return None
    finally:
        # One of the processes is that of all other tests.
        core.train.loop.LOG_EVERY = before


@pytest.mark.parametrize(("architecture", "tied"), MODELS)
def test_two_workers_train_what_a_plain_loop_trains(
    pair: TwoWorkers, examples: Path, tmp_path: Path, architecture: str, tied: bool
) -> None:
    more = MORE_DIVISIONS if (architecture, tied) == ("llama", True) else ()
    divisions = (*DIVISIONS, *more)
    _hold_against_a_plain_loop(pair, divisions, architecture, tied, examples, tmp_path)


@pytest.mark.parametrize(
    ("architecture", "tied"),
    [
        pytest.param(*model, marks=[] if model in FOUR_EVERY_DAY else [pytest.mark.soak])
        for model in MODELS
    ],
)
def test_four_workers_train_what_a_plain_loop_trains(
    four: FourWorkers, examples: Path, tmp_path: Path, architecture: str, tied: bool
) -> None:
    _hold_against_a_plain_loop(four, DIVISIONS, architecture, tied, examples, tmp_path)


def _hold_against_a_plain_loop(
    workers: TwoWorkers,
    divisions: tuple[dict[str, Any], ...],
    architecture: str,
    tied: bool,
    examples: Path,
    folder: Path,
) -> None:
    """The loss of every step and all last weights; both differ by rounding of float32 alone."""
    target = save_tiny(folder / "target", architecture, tied=tied)
    packing = architecture != "bloom"
    losses, wanted = plain(_task(target, examples, packing=packing))
    assert losses[-1] < losses[0]
    before = load_file(target / "model.safetensors")
    for number, division in enumerate(divisions):
        division = {**division, "num_workers": workers.count}
        task = _task(target, examples, packing=packing, **division)
        output = folder / str(number)
        figures = workers(run, task, output, output / "kept")[0]
        found = [r["loss"] for r in read_metrics(output) if "loss" in r]
        assert found == pytest.approx(losses, rel=1e-4), division
        assert figures["steps"] == len(losses)
        model = AutoModelForCausalLM.from_pretrained(output / "model", dtype=torch.float32)
        trained = dict(model.named_parameters())
        assert trained.keys() == wanted.keys()
        for name, tensor in wanted.items():
            found_part, wanted_part = decided(name, trained[name].detach()), decided(name, tensor)
            torch.testing.assert_close(
                found_part, wanted_part, rtol=1e-3, atol=2e-4, msg=f"{division} {name}"
            )
        changed = {n for n, t in before.items() if n in trained and not torch.equal(trained[n], t)}
        assert changed == before.keys() & trained.keys()


@pytest.mark.parametrize("method", ["lora", "qlora", "int8_lora"])
def test_two_workers_train_adapters_as_one_does(
    pair: TwoWorkers, staged: TwoWorkers, examples: Path, tmp_path: Path, method: str
) -> None:
    target = save_tiny(tmp_path / "target", "llama", hidden_size=64, head_dim=16)
    settings: dict[str, Any] = {"finetune": {"method": method}, "lr": 0.02}
    alone = run(
        0,
        _task(target, examples, parallelism="ddp", num_workers=1, **settings),
        tmp_path / "alone",
        tmp_path / "alone" / "kept",
    )
    assert alone is not None
    assert alone["final_loss"] < alone["initial_loss"]
    losses = [r["loss"] for r in read_metrics(tmp_path / "alone") if "loss" in r]
    wanted = load_file(tmp_path / "alone" / "adapter" / "adapter_model.safetensors")
    assert all(bool((tensor != 0).any()) for tensor in wanted.values())
    for parallelism in ("ddp", "zero2", "pipeline", *(["zero3"] if method == "lora" else [])):
        output = tmp_path / parallelism
        recomputes = parallelism != "ddp"
        task = _task(
            target,
            examples,
            parallelism=parallelism,
            gradient_checkpointing=recomputes,
            **settings,
        )
        workers = staged if parallelism == "pipeline" else pair
        workers(run, task, output, output / "kept")
        # int8 rounds what enters a layer: a difference in the last digit may become a step.
        rel = 0.02 if method == "int8_lora" else 1e-3
        found = [r["loss"] for r in read_metrics(output) if "loss" in r]
        assert found == pytest.approx(losses, rel=rel), parallelism


@pytest.mark.parametrize(
    ("method", "parallelism", "optimizer"),
    [
        ("full", "zero2", "adamw"),
        ("full", "zero3", "lion"),
        ("qlora", "zero1", "adamw"),
        ("full", "ddp", "adamw_8bit"),
    ],
)
def test_a_stopped_run_goes_on_with_another_number_of_workers(
    pair: TwoWorkers,
    examples: Path,
    tmp_path: Path,
    method: str,
    parallelism: str,
    optimizer: str,
) -> None:
    target = save_tiny(tmp_path / "target", "llama")
    settings: dict[str, Any] = {
        "parallelism": parallelism,
        "checkpoint_every": 2,
        "keep": "best",
        "lr": 1e-3,
        "finetune": {"method": method, "optimizer": optimizer},
    }
    two, one = (_task(target, examples, num_workers=n, **settings) for n in (2, 1))
    whole = tmp_path / "whole"
    undisturbed, _ = pair(run, two, whole, whole / "kept")
    for name, second in (("same", two), ("fewer", one)):
        output = tmp_path / name
        assert pair(run, two, output, output / "kept", 2) == [None, None]
        if second is two:
            figures, _ = pair(run, second, output, output / "kept")
        else:
            figures = run(0, second, output, output / "kept")
        curves = [
            [{k: v for k, v in r.items() if k not in MEASURED} for r in read_metrics(folder)]
            for folder in (output, whole)
        ]
        file = (
            "adapter/adapter_model.safetensors" if method == "qlora" else "model/model.safetensors"
        )
        found, wanted = load_file(output / file), load_file(whole / file)
        if second is two:
            assert curves[0] == curves[1]
            assert figures["held_out_loss"] == undisturbed["held_out_loss"]
            assert all(torch.equal(found[n], wanted[n]) for n in wanted)
        else:
            for record, undone in zip(*curves, strict=True):
                for key, value in undone.items():
                    # Lion's steps have one size, so that rounding may turn some of them.
                    assert record[key] == pytest.approx(value, rel=2e-2), key
