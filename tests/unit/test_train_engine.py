"""The DeepSpeed engine and the loop, in one process over gloo."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.config import Config
from core.draft.base import DraftHead
from core.draft.folder import load_head
from core.errors import StageError
from core.models.weights import load_embedding, load_output_head
from core.tracking import read_metrics
from core.train.draft import DraftTrainee
from core.train.engine import TrainingEngine, build_engine
from core.train.loop import MEASURED
from core.train.schedule import learning_rate
from core.train.task import DraftTask, prepare, train
from tests.folder_host import FolderHost
from tests.tiny_features import batch_maker, write_tiny_features

pytestmark = pytest.mark.usefixtures("process_group")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_tiny_features(tmp_path_factory.mktemp("tiny"), examples=24, held_out=5)


def _task(folders: tuple[Path, Path], **train: Any) -> DraftTask:
    settings = {
        "num_workers": 1,
        "global_batch_size": 8,
        "micro_batch_size": 3,
        "max_length": 24,
        "lr": 1e-2,
        "warmup_steps": 2,
        "epochs": 2,
        "eval_every": 3,
        "checkpoint_every": 2,
        **train,
    }
    config = Config().replace(
        train=settings, draft={"vocab_size": 40}, tracking={"wandb": "disabled"}
    )
    return prepare(config, str(folders[0]), folders[1])


def _engine(task: DraftTask) -> TrainingEngine:
    embedding, output_head = load_embedding(Path(task.target)), load_output_head(Path(task.target))
    trainee = DraftTrainee(task.new_head(), embedding, output_head)
    return build_engine(trainee, task.config.train, CPU)


def _steps(engine: TrainingEngine, task: DraftTask, steps: range) -> list[float]:
    """Train; returns the gradient norms."""
    maker, norms = batch_maker(task), []
    for step in steps:
        passes = task.order.micro_batches(step, 0, 1, task.config.train.micro_batch_size)
        for number, rows in enumerate(passes, start=1):
            batch = maker.batch(rows, step)
            engine.accumulate(batch, task.order.supervised(step), last=number == len(passes))
        norms.append(engine.step(learning_rate(step, task.order.total_steps, task.config.train)))
    return norms


def _reference(task: DraftTask, steps: int) -> tuple[DraftHead, list[float]]:
    """The same in plain torch, the global batch in one pass."""
    config, head, maker = task.config.train, task.new_head(), batch_maker(task)
    head.attach_target(load_embedding(Path(task.target)), load_output_head(Path(task.target)))
    optimizer = torch.optim.AdamW(head.parameters(), betas=config.betas, weight_decay=0.0)
    norms = []
    for step in range(steps):
        result = head.losses(maker.batch(task.order.global_batch(step), step))
        optimizer.zero_grad()
        (result.loss / result.num_tokens).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(head.parameters(), config.clip)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, task.order.total_steps, config)
        optimizer.step()
    return head, norms


@pytest.mark.parametrize("parallelism", ["ddp", "zero0", "zero1", "zero2", "zero3"])
def test_steps_equal_plain_torch_on_the_whole_batch(
    folders: tuple[Path, Path], parallelism: str
) -> None:
    # A small clip, so that clipping takes part.
    task = _task(folders, parallelism=parallelism, clip=0.05)
    reference, norms = _reference(task, steps=4)
    engine = _engine(task)
    assert _steps(engine, task, range(4)) == pytest.approx(norms, rel=1e-4)
    assert min(norms) > task.config.train.clip
    weights, before = engine.full_weights(), task.new_head().state_dict()
    for name, wanted in reference.state_dict().items():
        torch.testing.assert_close(weights[name], wanted, rtol=1e-4, atol=1e-5)
        assert (weights[name] - before[name]).abs().max() > 1e-3, name


def test_two_workers_add_up_to_one(folders: tuple[Path, Path]) -> None:
    """The mean over workers of what each hands to DeepSpeed is the whole batch's gradient."""
    task = _task(folders)
    maker, order, world_size = batch_maker(task), task.order, 2

    def gradient(parts: list[np.ndarray], scale: float) -> torch.Tensor:
        head = task.new_head()
        head.attach_target(load_embedding(Path(task.target)), load_output_head(Path(task.target)))
        for rows in parts:
            (head.losses(maker.batch(rows, 0)).loss * scale).backward()
        return torch.cat([p.grad.flatten() for p in head.parameters() if p.grad is not None])

    whole = gradient([order.global_batch(0)], 1 / order.supervised(0))
    scale = world_size / order.supervised(0)
    workers = [gradient(order.micro_batches(0, r, world_size, 3), scale) for r in range(world_size)]
    assert not torch.allclose(workers[0], whole, rtol=0.1)
    torch.testing.assert_close(sum(workers) / world_size, whole, rtol=1e-4, atol=1e-6)


def test_bfloat16_keeps_float32_weights_and_positions(folders: tuple[Path, Path]) -> None:
    task = _task(folders, dtype="bfloat16", parallelism="zero1")
    engine = _engine(task)
    head = engine.module.head
    assert isinstance(head, DraftHead)
    assert {p.dtype for p in head.parameters()} == {torch.bfloat16}
    for name, buffer in task.new_head().named_buffers():
        assert torch.equal(dict(head.named_buffers())[name], buffer)
    _steps(engine, task, range(2))
    weights = engine.full_weights()
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    # Updates smaller than bfloat16 resolves are kept.
    fc = weights["fc.weight"]
    assert not torch.equal(fc, fc.bfloat16().float())
    assert torch.equal(fc.bfloat16(), dict(head.named_parameters())["fc.weight"])


def _curve(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in MEASURED} for r in read_metrics(folder)]


def test_a_run_goes_on_exactly(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every 2 steps a checkpoint: the run goes on from step 4, in the middle of a record's steps.
    monkeypatch.setattr("core.train.loop.LOG_EVERY", 3)
    task = _task(folders, epochs=3)
    assert task.order.total_steps == 9
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    whole = train(task, undisturbed, "run", FolderHost(undisturbed / "kept"), CPU)
    with pytest.raises(KeyboardInterrupt):
        train(task, killed, "run", FolderHost(killed / "kept", stop_after=6), CPU)
    assert not (killed / "head").exists()
    # The kill came later: a checkpoint was lost, and records beyond the one before it are there.
    shutil.rmtree(killed / "kept" / "step-00000006")
    figures = train(task, killed, "run", FolderHost(killed / "kept"), CPU)

    timed = ("seconds", "tokens_per_second")
    assert {k: v for k, v in figures.items() if k not in timed} == {
        k: v for k, v in whole.items() if k not in timed
    }
    assert [record["step"] for record in _curve(killed)] == [1, 3, 3, 6, 6, 9, 9]
    assert _curve(killed) == _curve(undisturbed)
    heads = [load_head(folder / "head").state_dict() for folder in (killed, undisturbed)]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[1])


def test_training_learns_and_says_so(folders: tuple[Path, Path], tmp_path: Path) -> None:
    task = _task(folders, epochs=20, keep="last")
    figures = train(task, tmp_path, "run", FolderHost(tmp_path / "kept"), CPU)
    assert figures["final_loss"] < 0.8 * figures["initial_loss"]
    assert figures["steps"] == 60
    assert figures["epochs"] == 20
    assert figures["train_tokens"] == sum(task.order.tokens(step) for step in range(60))
    last_evaluation = [r for r in read_metrics(tmp_path) if "held_out_loss" in r][-1]
    for name in ("loss", "top1", "top2", "top3", "top10"):
        assert figures[f"held_out_{name}"] == last_evaluation[f"held_out_{name}"]


def test_a_finished_run_saves_its_head_again(folders: tuple[Path, Path], tmp_path: Path) -> None:
    task, host = _task(folders), FolderHost(tmp_path / "kept")
    first = train(task, tmp_path, "run", host, CPU)
    weights = load_head(tmp_path / "head").state_dict()
    shutil.rmtree(tmp_path / "head")
    assert train(task, tmp_path, "run", host, CPU) == first
    again = load_head(tmp_path / "head").state_dict()
    assert all(torch.equal(again[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("dtype", "parallelism"), [("float32", "zero1"), ("bfloat16", "zero1"), ("bfloat16", "ddp")]
)
def test_a_loss_that_is_no_number_names_the_step(
    folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    parallelism: str,
) -> None:
    monkeypatch.setattr("core.train.loop.LOG_EVERY", 100)
    settings = {"dtype": dtype, "parallelism": parallelism, "checkpoint_every": 1000}
    task = _task(folders, lr=1e30, warmup_steps=0, **settings)
    with pytest.raises(StageError, match=r"loss is \w+ at step [23];.*lower train\.lr"):
        train(task, tmp_path, "run", FolderHost(tmp_path / "kept"), CPU)
    assert not (tmp_path / "kept").exists()


def test_a_moving_average_is_what_is_evaluated_and_saved(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    for parallelism in ("ddp", "zero1", "zero2", "zero3"):
        task = _task(folders, ema=0.9, parallelism=parallelism)
        engine = _engine(task)
        wanted, maker = engine.full_weights(), batch_maker(task)
        for step in range(4):
            _steps(engine, task, range(step, step + 1))
            share = 1 - min(0.9, (2 + step) / (11 + step))
            now = engine.full_weights()
            wanted = {n: t + share * (now[n] - t) for n, t in wanted.items()}
        before = engine.evaluate(maker.batch(np.arange(4)))
        with engine.averaged():
            averaged = engine.full_weights()
            inside = engine.evaluate(maker.batch(np.arange(4)))
        for name, tensor in wanted.items():
            torch.testing.assert_close(averaged[name], tensor)
            assert torch.equal(engine.full_weights()[name], now[name])
        assert not torch.equal(inside, before)
        assert torch.equal(engine.evaluate(maker.batch(np.arange(4))), before)
        head = task.new_head()
        head.load_state_dict(averaged)
        head.attach_target(load_embedding(Path(task.target)), load_output_head(Path(task.target)))
        with torch.no_grad():
            alone = head.eval().losses(maker.batch(np.arange(4))).loss
        assert float(inside[0]) == pytest.approx(float(alone), rel=1e-5)


def test_float16_scales_its_loss(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """The first scale overflows float16, so that steps are skipped and the scale comes down."""
    task = _task(folders, dtype="float16", parallelism="ddp", epochs=4, lr=3e-3)
    engine = _engine(task)
    start = engine.full_weights()
    norms = _steps(engine, task, range(1))
    skipped = not np.isfinite(norms[0])
    assert skipped == all(torch.equal(t, start[n]) for n, t in engine.full_weights().items())
    _steps(engine, task, range(1, 8))
    engine.save(tmp_path)
    again = _engine(task)
    again.load(tmp_path)
    assert again._scaler_state() == engine._scaler_state() != {}
    _steps(engine, task, range(8, 12))
    _steps(again, task, range(8, 12))
    for name, tensor in engine.full_weights().items():
        assert torch.equal(again.full_weights()[name], tensor)
        assert torch.isfinite(tensor).all()
    reference, _ = _reference(_task(folders, epochs=4, lr=3e-3), steps=12)
    if not skipped:
        for name, wanted in reference.state_dict().items():
            torch.testing.assert_close(engine.full_weights()[name], wanted, rtol=0.05, atol=5e-3)


@pytest.mark.parametrize("written", ["ddp", "zero0", "zero1", "zero2", "zero3"])
def test_any_engine_goes_on_from_any_other(
    folders: tuple[Path, Path], tmp_path: Path, written: str
) -> None:
    """Of the same kind bit by bit."""
    first = _engine(_task(folders, parallelism=written, ema=0.5))
    task = _task(folders, ema=0.5)
    _steps(first, task, range(3))
    first.save(tmp_path)
    _steps(first, task, range(3, 6))
    for read in {"ddp", "zero1", written}:
        engine = _engine(_task(folders, parallelism=read, ema=0.5))
        engine.load(tmp_path)
        _steps(engine, task, range(3, 6))
        pairs = [(engine.full_weights(), first.full_weights())]
        with engine.averaged(), first.averaged():
            pairs.append((engine.full_weights(), first.full_weights()))
        for found, wanted in pairs:
            for name, tensor in wanted.items():
                if read == written:
                    assert torch.equal(found[name], tensor), name
                else:
                    torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parallelism", ["ddp", "zero1", "zero3"])
def test_recomputing_activations_changes_nothing_but_memory(
    folders: tuple[Path, Path], parallelism: str
) -> None:
    kept, recomputed = (
        _engine(_task(folders, parallelism=parallelism, gradient_checkpointing=wanted))
        for wanted in (False, True)
    )
    task = _task(folders)
    assert _steps(kept, task, range(3)) == _steps(recomputed, task, range(3))
    for name, tensor in kept.full_weights().items():
        assert torch.equal(recomputed.full_weights()[name], tensor), name


def test_recomputing_keeps_fewer_activations(folders: tuple[Path, Path]) -> None:
    task = _task(folders)
    batch = batch_maker(task).batch(task.order.global_batch(0), 0)

    def kept_bytes(recomputes: bool) -> int:
        head = task.new_head().train()
        head.recomputes = recomputes
        head.attach_target(load_embedding(Path(task.target)), load_output_head(Path(task.target)))
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            head.losses(batch)
        parameters = {p.untyped_storage().data_ptr() for p in head.parameters()}
        return sum(size for place, size in sizes.items() if place not in parameters)

    assert 0 < kept_bytes(True) < 0.5 * kept_bytes(False)
