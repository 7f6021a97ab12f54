"""train_draft on two raylets: the same result as plain torch, and as ever after kills."""

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

from core.config import Config
from core.decode.load import load_decoder
from core.decode.tree import PLAIN, TreePlan
from core.draft.base import DraftHead
from core.draft.folder import load_head, read_record
from core.errors import InputError
from core.models.weights import load_embedding, load_output_head
from core.runtime.job import run_stage
from core.runtime.training import RUN
from core.runtime.workers import FAILURES, STORAGE
from core.tracking import read_json_lines, read_metrics
from core.train.engine import FILE
from core.train.loop import MEASURED
from core.train.order import evaluation_batches
from core.train.schedule import learning_rate
from core.train.task import DraftTask, prepare
from jobs.train_draft import JOB
from tests.killing import RankKiller, last_checkpoint, wait_for_step
from tests.tiny_features import batch_maker, write_tiny_features

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT_EVERY = 25


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    target, features = write_tiny_features(tmp_path_factory.mktemp("tiny"), examples=50, held_out=7)
    return {
        "target.path": target,
        "features.path": features,
        "draft.vocab_size": 40,
        "train.num_workers": 2,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 3,
        "train.max_length": 24,
        "train.lr": 0.005,
        "train.warmup_steps": 10,
        "train.epochs": 50,
        "train.eval_every": 100,
        "train.checkpoint_every": CHECKPOINT_EVERY,
        # Of the last step, so that it is the plain run's.
        "train.keep": "last",
        "tracking.wandb": "disabled",
    }


@pytest.fixture(scope="module")
def undisturbed(
    two_nodes: str, overrides: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, dict[str, Any]]:
    """A whole run; its config and report."""
    config = _config(overrides, two_nodes, tmp_path_factory.mktemp("undisturbed") / "out")
    return config, dict(run_stage(JOB, config))


def _config(overrides: dict[str, Any], address: str, output: Path) -> Config:
    sections: dict[str, dict[str, Any]] = {"cluster": {"address": address}}
    for dotted, value in overrides.items():
        section, _, key = dotted.partition(".")
        sections.setdefault(section, {})[key] = str(value) if isinstance(value, Path) else value
    return Config().replace(output=str(output), **sections)


def _task(config: Config) -> DraftTask:
    return prepare(config, str(config.target.path), Path(str(config.features.path)))


def _reference(task: DraftTask) -> tuple[DraftHead, list[tuple[float, int]]]:
    """Plain torch in this process; sum of losses and supervised tokens of every step."""
    config, head, maker = task.config.train, task.new_head(), batch_maker(task)
    head.attach_target(load_embedding(Path(task.target)), load_output_head(Path(task.target)))
    optimizer = torch.optim.AdamW(head.parameters(), betas=config.betas, weight_decay=0.0)
    losses = []
    for step in range(task.order.total_steps):
        result = head.losses(maker.batch(task.order.global_batch(step), step))
        loss = result.loss / result.num_tokens
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), config.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, task.order.total_steps, config)
        optimizer.step()
        losses.append((float(loss.detach()) * int(result.num_tokens), int(result.num_tokens)))
    return head, losses


def _curve(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in MEASURED} for r in read_metrics(folder)]


def test_two_workers_train_like_plain_torch(
    undisturbed: tuple[Config, dict[str, Any]],
) -> None:
    config, report = undisturbed
    output, task = Path(str(config.output)), _task(config)
    head, losses = _reference(task)
    records = [record for record in read_metrics(output) if "loss" in record]
    assert [record["step"] for record in records] == [1, *range(10, 301, 10)]
    for before, record in zip([{"step": 0}, *records], records, strict=False):
        window = losses[before["step"] : record["step"]]
        mean = sum(loss for loss, _ in window) / sum(tokens for _, tokens in window)
        assert record["loss"] == pytest.approx(mean, rel=2e-3), record["step"]
    assert report["final_loss"] < 0.7 * report["initial_loss"]
    assert report["final_loss"] == records[-1]["loss"]

    trained = load_head(output / "head")
    for name, wanted in head.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], wanted, rtol=0.02, atol=0.01)

    assert task.held_out is not None
    (rows,) = evaluation_batches(task.held_out, 0, 1, 100)
    maker = batch_maker(task, held_out=True)
    with torch.no_grad():
        result = head.eval().losses(maker.batch(rows))
    tokens = int(result.num_tokens)
    assert report["held_out_loss"] == pytest.approx(float(result.loss) / tokens, rel=5e-3)
    assert report["held_out_top10"] == pytest.approx(float(result.sums["top10"]) / tokens, abs=0.03)


def test_an_eagle3_head_is_trained_from_shards(
    two_nodes: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    """By two workers as by plain torch; it knows its layers, and decodes losslessly."""
    layers = (2, 3, 4, 7)
    target, features = write_tiny_features(
        tmp_path, examples=50, held_out=7, num_layers=7, layers=layers
    )
    settings = {
        **overrides,
        "target.path": target,
        "target.dtype": "float32",
        "features.path": features,
        "train.epochs": 8,
    }
    values = {"kind": "eagle3", "vocab_size": settings.pop("draft.vocab_size")}
    config = _config(settings, two_nodes, tmp_path / "out").replace(draft=values)
    report = dict(run_stage(JOB, config))
    _, losses = _reference(_task(config))
    records = [record for record in read_metrics(tmp_path / "out") if "loss" in record]
    assert records[0]["loss"] == pytest.approx(losses[0][0] / losses[0][1], rel=1e-4)
    window = losses[records[-2]["step"] : records[-1]["step"]]
    mean = sum(loss for loss, _ in window) / sum(tokens for _, tokens in window)
    assert records[-1]["loss"] == pytest.approx(mean, rel=2e-3)
    assert report["final_loss"] < 0.95 * report["initial_loss"]

    head = tmp_path / "out" / "head"
    assert read_record(head)["feature_layers"] == list(layers)
    decoding = {"total_tokens": 16, "depth": 3, "top_k": 4, "max_context": 128}
    decoder = load_decoder(
        config.replace(draft={"path": str(head)}, decode=decoding), num_threads=1
    ).decoder
    assert decoder.feature_layers == layers

    def answer(plan: TreePlan) -> list[int]:
        rounds = decoder.generate([1, 30, 31, 32], max_new_tokens=16, plan=plan)
        return [token for done in rounds for token in done.tokens]

    assert answer(decoder.plan) == answer(PLAIN)


def test_the_run_is_spread_and_leaves_what_it_should(
    undisturbed: tuple[Config, dict[str, Any]],
) -> None:
    config, report = undisturbed
    output = Path(str(config.output))
    assert report["workers"] == 2
    assert report["nodes"] == 2
    assert report["steps"] == 300
    assert report["draft_vocab_size"] == 40
    assert read_record(output / "head")["training"]["steps"] == 300
    kept = sorted(path.name for path in (output / "ray_train" / "draft").glob("step-*"))
    assert kept == ["step-00000275", "step-00000300"]
    assert (output / "loss.png").stat().st_size > 1000
    assert (output / "accuracy.png").stat().st_size > 1000
    assert (output / "accepted_length.png").stat().st_size > 1000


@pytest.fixture(scope="module")
def interrupted(
    two_nodes: str,
    overrides: dict[str, Any],
    undisturbed: tuple[Config, dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """What a run of two workers leaves whose driver was killed at a random step."""
    folder = tmp_path_factory.mktemp("interrupted")
    output = folder / "out"
    arguments = [f"{name}={value}" for name, value in overrides.items()]
    command = [sys.executable, "-m", "jobs.train_draft", *arguments]
    with (folder / "driver.log").open("w") as log:
        driver = subprocess.Popen(
            [*command, f"output={output}", f"cluster.address={two_nodes}"],
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
    times: int,
    two_nodes: str,
    overrides: dict[str, Any],
    undisturbed: tuple[Config, dict[str, Any]],
    interrupted: Path,
    tmp_path: Path,
) -> None:
    """The driver is killed, then rank 1 of the run that goes on, once or three times."""
    config, whole = undisturbed
    output = tmp_path / "out"
    shutil.copytree(interrupted, output)
    killer = RankKiller(output, times, CHECKPOINT_EVERY)
    report = dict(run_stage(JOB, _config(overrides, two_nodes, output)))
    killer.join()
    assert len(killer.killed_after) == times, "the run ended before rank 1 was killed"
    assert len(read_json_lines(output / FAILURES)) >= times

    timed = ("seconds", "tokens_per_second")
    assert {k: v for k, v in report.items() if k not in timed} == {
        k: v for k, v in whole.items() if k not in timed
    }
    undisturbed_output = Path(str(config.output))
    assert _curve(output) == _curve(undisturbed_output)
    heads = [load_head(folder / "head").state_dict() for folder in (output, undisturbed_output)]
    assert heads[0].keys() == heads[1].keys()
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[1])


def test_a_damaged_checkpoint_ends_the_run_until_it_is_removed(
    two_nodes: str,
    overrides: dict[str, Any],
    interrupted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At once, though any number of lost workers is survived; what the error says helps."""
    output = tmp_path / "out"
    shutil.copytree(interrupted, output)
    newest = output / STORAGE / RUN / f"step-{last_checkpoint(output, 'draft'):08d}"
    (newest / FILE).write_bytes((newest / FILE).read_bytes()[:-100])
    config = _config({**overrides, "train.max_failures": -1}, two_nodes, output)
    failures = len(read_json_lines(output / FAILURES))
    with pytest.raises(InputError, match=f"is damaged; remove {newest} to go on"):
        run_stage(JOB, config)
    shutil.rmtree(newest)
    report = run_stage(JOB, config)
    assert f"{newest.name} of {newest.parent} was removed; training" in capsys.readouterr().out
    assert report["steps"] == 300
    assert len(read_json_lines(output / FAILURES)) == failures
    assert len([*newest.parent.glob("*step-*")]) == config.train.keep_checkpoints


def test_one_worker_goes_on_where_two_were(
    two_nodes: str,
    overrides: dict[str, Any],
    undisturbed: tuple[Config, dict[str, Any]],
    interrupted: Path,
    tmp_path: Path,
) -> None:
    config, whole = undisturbed
    output = tmp_path / "out"
    shutil.copytree(interrupted, output)
    before = last_checkpoint(output, "draft")
    alone = {**overrides, "train.num_workers": 1}
    report = dict(run_stage(JOB, _config(alone, two_nodes, output)))
    assert (report["workers"], report["steps"]) == (1, 300)
    assert before > 0
    undone = Path(str(config.output))
    for found, wanted in zip(_curve(output), _curve(undone), strict=True):
        assert found["step"] == wanted["step"]
        assert found["tokens"] == wanted["tokens"], "other sequences"
        name = "loss" if "loss" in wanted else "held_out_loss"
        # Gradients are summed in another order: equal up to there, then within rounding's growth.
        exact = found["step"] <= before
        assert found[name] == pytest.approx(wanted[name], rel=0 if exact else 2e-3)
    assert report["train_tokens"] == whole["train_tokens"]
    assert report["final_loss"] == pytest.approx(whole["final_loss"], rel=2e-3)
    heads = [load_head(folder / "head").state_dict() for folder in (output, undone)]
    for name, wanted in heads[1].items():
        torch.testing.assert_close(heads[0][name], wanted, rtol=0.02, atol=0.01)
