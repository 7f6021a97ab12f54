"""finetune_target on two raylets: as one process does it, and as ever after kills.

The pipeline's stages are on different raylets; more of its workers than CPUs take half of one each.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from core.config import Config
from core.errors import ResourceError
from core.runtime.job import run_stage
from core.runtime.workers import FAILURES
from core.tracking import read_json_lines, read_metrics
from core.train.finetune import prepare_finetuning
from core.train.loop import MEASURED
from jobs.finetune_target import JOB
from tests.killing import RankKiller, last_checkpoint, wait_for_step
from tests.plain_finetuning import plain
from tests.tiny_targets import save_tiny, write_tiny_examples

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT_EVERY = 25
STEPS = 200
PIPELINE = {"parallelism": "pipeline", "placement": "strict_spread"}
ZERO = {"parallelism": "zero2"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tiny")
    target = save_tiny(folder / "target", "llama", tied=True)
    examples = write_tiny_examples(folder / "examples", examples=40, held_out=6)
    return {"target": {"path": str(target)}, "data": {"examples": str(examples)}}


def _config(inputs: dict[str, Any], address: str, output: Path, **train: Any) -> Config:
    settings = {
        "num_workers": 2,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "max_length": 20,
        "lr": 2e-3,
        "weight_decay": 0.1,
        "warmup_steps": 5,
        "epochs": STEPS,
        "max_steps": STEPS,
        "clip": 0.5,
        "eval_every": 100,
        "checkpoint_every": CHECKPOINT_EVERY,
        # Of the last step, so that it is the plain run's.
        "keep": "last",
        **train,
    }
    sections = {"train": settings, "cluster": {"address": address}, **inputs}
    return Config().replace(output=str(output), tracking={"wandb": "disabled"}, **sections)


def _curve(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in MEASURED} for r in read_metrics(folder)]


def _weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")


@pytest.mark.parametrize(
    ("settings", "nodes"),
    [
        (PIPELINE, 2),
        ({"parallelism": "zero3"}, 2),
        pytest.param(
            {"parallelism": "pipeline", "num_workers": 4, "cpus_per_worker": 0.5},
            2,
            marks=pytest.mark.soak,
        ),
        pytest.param({"parallelism": "ddp", "placement": "pack"}, 2, marks=pytest.mark.soak),
    ],
    ids=["pipeline-2x1-apart", "zero3", "pipeline-2x2", "ddp"],
)
def test_workers_of_ray_train_what_one_process_trains(
    two_nodes: str, inputs: dict[str, Any], tmp_path: Path, settings: dict[str, Any], nodes: int
) -> None:
    """Losses and weights of 20 steps; they differ by rounding of float32 alone."""
    config = _config(inputs, two_nodes, tmp_path / "out", **settings, max_steps=20)
    target, examples = str(config.target.path), Path(str(config.data.examples))
    losses, wanted = plain(prepare_finetuning(config, target, examples))
    report = dict(run_stage(JOB, config))
    assert report["steps"] == 20 and report["nodes"] == nodes
    assert report["workers"] == config.train.num_workers
    assert report["initial_loss"] == pytest.approx(losses[0], rel=1e-5)
    # By the tokens of each step; all batches are of nearly as many.
    assert report["final_loss"] == pytest.approx(sum(losses[10:]) / 10, rel=2e-2)
    assert report["held_out_loss"] < report["held_out_loss_before"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", dtype=torch.float32)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), wanted[name], rtol=1e-3, atol=2e-4, msg=name)


def test_workers_that_cannot_stand_apart_are_refused(
    two_nodes: str, inputs: dict[str, Any], tmp_path: Path
) -> None:
    """Ray would wait for a third node for ever."""
    settings = {"num_workers": 3, "pipeline_stages": 3, "cpus_per_worker": 0.5}
    config = _config(inputs, two_nodes, tmp_path / "out", **{**PIPELINE, **settings})
    config = config.replace(cluster={"can_grow": False})
    with pytest.raises(ResourceError, match=r"cannot hold 3 training workers .* apart"):
        run_stage(JOB, config)


@pytest.fixture(scope="module", params=[PIPELINE, pytest.param(ZERO, marks=pytest.mark.soak)])
def undisturbed(
    request: pytest.FixtureRequest,
    two_nodes: str,
    inputs: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Any], Path, dict[str, Any]]:
    """A whole run: its settings, folder and report."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    report = dict(run_stage(JOB, _config(inputs, two_nodes, output, **request.param)))
    return request.param, output, report


@pytest.fixture(scope="module")
def interrupted(
    two_nodes: str,
    inputs: dict[str, Any],
    undisturbed: tuple[dict[str, Any], Path, dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """What such a run leaves whose driver was killed at a random step."""
    folder = tmp_path_factory.mktemp("interrupted")
    output = folder / "out"
    config = _config(inputs, two_nodes, output, **undisturbed[0])
    arguments = [
        f"{section}.{name}={value}"
        for section in ("target", "data", "train", "tracking", "cluster")
        for name, value in getattr(config, section).model_dump(exclude_unset=True).items()
        if value is not None and not isinstance(value, tuple)
    ]
    with (folder / "driver.log").open("w") as log:
        driver = subprocess.Popen(
            [sys.executable, "-m", "jobs.finetune_target", *arguments, f"output={output}"],
            cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            wait_for_step(output, random.randint(CHECKPOINT_EVERY + 5, 80), driver)
        finally:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
    assert not (output / "report.json").exists()
    return output


@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.soak)])
def test_kills_change_nothing(
    two_nodes: str,
    inputs: dict[str, Any],
    undisturbed: tuple[dict[str, Any], Path, dict[str, Any]],
    interrupted: Path,
    tmp_path: Path,
    times: int,
) -> None:
    """The driver is killed, then rank 1 of the run that goes on, once or three times."""
    settings, whole, report = undisturbed
    output = tmp_path / "out"
    shutil.copytree(interrupted, output)
    killer = RankKiller(output, times, CHECKPOINT_EVERY)
    again = dict(run_stage(JOB, _config(inputs, two_nodes, output, **settings)))
    killer.join()
    assert len(killer.killed_after) == times, "rank 1 was not killed as often as that"
    assert len(read_json_lines(output / FAILURES)) >= times
    changing = ("seconds", "tokens_per_second", "peak_memory_mib")
    assert {k: v for k, v in again.items() if k not in changing} == {
        k: v for k, v in report.items() if k not in changing
    }
    assert _curve(output) == _curve(whole)
    found, wanted = _weights(output), _weights(whole)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_one_worker_with_all_layers_goes_on_where_two_were(
    two_nodes: str,
    inputs: dict[str, Any],
    undisturbed: tuple[dict[str, Any], Path, dict[str, Any]],
    interrupted: Path,
    tmp_path: Path,
) -> None:
    """From a pipeline to data parallelism, and from two workers to one."""
    _, whole, wanted = undisturbed
    output = tmp_path / "out"
    shutil.copytree(interrupted, output)
    before = last_checkpoint(output, "target")
    assert before > 0
    config = _config(inputs, two_nodes, output, parallelism="ddp", num_workers=1)
    report = dict(run_stage(JOB, config))
    assert (report["workers"], report["steps"], report["parallelism"]) == (1, STEPS, "ddp")
    for ours, undone in zip(_curve(output), _curve(whole), strict=True):
        assert (ours["step"], ours["tokens"]) == (undone["step"], undone["tokens"])
        name = "loss" if "loss" in undone else "held_out_loss"
        # Gradients are summed in another order: equal up to there, then within rounding's growth.
        exact = ours["step"] <= before
        assert ours[name] == pytest.approx(undone[name], rel=0 if exact else 5e-3)
    assert report["final_loss"] == pytest.approx(wanted["final_loss"], rel=5e-3)
