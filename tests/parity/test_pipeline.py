"""Pipelines against a plain loop in one process, for every architecture and topology.

The plain loop is transformers' model and torch's AdamW on the whole batch, padded. All else
differs: layers called one by one, micro-batches of unequal token counts, some of them packed,
gradients of tied weights from two stages, an optimizer's state in parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from core.config import Config, FinetuneConfig, TrainConfig
from core.data.examples import Example
from core.errors import ConfigError, InputError
from core.models.stage_saving import write_stages
from core.models.stages import ModelStages
from core.tracking import read_metrics
from core.train.causal import UNSUPERVISED, CausalBatch, collate
from core.train.engine import FILE
from core.train.finetune import finetune, prepare_finetuning
from core.train.pipeline_engine import PipelineEngine, StagedTrainee
from tests import tiny_targets
from tests.folder_host import FolderHost
from tests.tiny_models import TINY_CONFIGS, save_tiny
from tests.two_workers import FourWorkers, TwoWorkers

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("process_group")]

# Nine rows: two shares have five and four of them, three and two micro-batches.
STEPS, ROWS, MICRO, CLIP, LR = 4, 9, 2, 1.0, 3e-3
# Float32: sums in another order differ in their last bits. A loss by some 2e-7 of itself (measured;
# bounded here by ten times that), a gradient by 1e-7 of the largest, which are about 1. AdamW
# divides gradients by their own size, unless that is far below EPSILON: a gradient that is zero but
# for rounding, as a key's bias has it, would otherwise move its weight by whole steps. All steps
# together can move one by STEPS * LR; a thousandth of that is allowed (measured: a fifth of it).
EPSILON = 5e-6
LOSS_SHARE, WEIGHT_OFF = 2e-6, 1e-3 * STEPS * LR
PARTS = {1: [5], 2: [2, 3], 4: [1, 1, 2, 1]}


def sequences(step: int) -> list[tuple[Tensor, Tensor]]:
    """Tokens and supervised places of the global batch of a step, of unequal lengths."""
    draw = torch.Generator().manual_seed(step)
    found = []
    for _ in range(ROWS):
        length = int(torch.randint(4, 17, (), generator=draw))
        ids_T = torch.randint(3, 67, (length,), generator=draw)
        mask_T = torch.rand(length, generator=draw) < 0.6
        mask_T[0], mask_T[-1] = False, True
        found.append((ids_T, mask_T))
    return found


def batch_of(rows: list[tuple[Tensor, Tensor]], packing: bool = False) -> CausalBatch:
    examples = [
        Example(str(row), ids_T.int().numpy(), mask_T.numpy(), "", 1)
        for row, (ids_T, mask_T) in enumerate(rows)
    ]
    return collate(examples, [len(ids_T) for ids_T, _ in rows], packing=packing)


class Staged(StagedTrainee):
    """With the test's own optimizer."""

    def optimizer(self, config: TrainConfig) -> torch.optim.Optimizer:
        return adamw(self.trained())


def adamw(weights: Mapping[str, nn.Parameter]) -> torch.optim.AdamW:
    """Decay on matrices only; a stage may have no vectors."""
    groups = [
        {"params": [p for p in weights.values() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in weights.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=LR, betas=(0.9, 0.95), eps=EPSILON
    )


def open_engine(
    folder: Path,
    pipe: int,
    *,
    dtype: torch.dtype = torch.float32,
    parts: list[int] | None = None,
    **settings: Any,
) -> PipelineEngine:
    config = TrainConfig(
        clip=CLIP,
        num_workers=pipe,
        pipeline_stages=pipe,
        parts=tuple(parts or PARTS[pipe]),
        parallelism="pipeline",
        **settings,
    )
    return PipelineEngine(Staged(ModelStages(folder, dtype=dtype), FinetuneConfig()), config)


def train(
    engine: PipelineEngine, first: int, last: int, packing: bool = False
) -> list[list[float]]:
    """Loss a token over all workers, and gradient's norm, of some steps."""
    curve = []
    for step in range(first, last):
        rows = sequences(step)
        total = sum(int(mask_T[1:].sum()) for _, mask_T in rows)
        share = rows[engine.data_rank :: engine.data_size]
        passes = [share[start : start + MICRO] for start in range(0, len(share), MICRO)]
        sums = torch.stack(
            [
                engine.accumulate(batch_of(part, packing), total, last=part is passes[-1])
                for part in passes
            ]
        ).sum(0)
        norm = engine.step(LR)
        torch.distributed.all_reduce(sums)
        assert int(sums[1]) == total
        curve.append([float(sums[0]) / total, norm])
    return curve


def run(rank: int, folder: Path, pipe: int, packing: bool) -> Any:
    """A whole run: its curve, and the weights on the first worker."""
    engine = open_engine(folder, pipe)
    curve = train(engine, 0, STEPS, packing)
    weights = engine.full_weights()
    return curve, weights if rank == 0 else None


def begin(rank: int, folder: Path, pipe: int, kept: Path) -> Any:
    """The first half of a run, saved."""
    engine = open_engine(folder, pipe)
    curve = train(engine, 0, STEPS // 2)
    engine.save(kept)
    return curve


def go_on(rank: int, folder: Path, pipe: int, kept: Path) -> Any:
    """The second half, from what the first has saved."""
    engine = open_engine(folder, pipe)
    engine.load(kept)
    curve = train(engine, STEPS // 2, STEPS)
    weights = engine.full_weights()
    return curve, weights if rank == 0 else None


def refused(rank: int, folder: Path, pipe: int, kept: Path) -> str:
    """What a load complains of."""
    engine = open_engine(folder, pipe)
    with pytest.raises(InputError) as caught:
        engine.load(kept)
    return str(caught.value)


def evaluate(rank: int, folder: Path, pipe: int) -> Any:
    """Statistics of two passes of each share, twice; and of one step's after them."""
    engine = open_engine(folder, pipe)
    found = []
    for _ in range(2):
        rows = sequences(0)[engine.data_rank :: engine.data_size]
        sums = engine.evaluate(batch_of(rows[:3]), batch_of(rows[3:]))
        torch.distributed.all_reduce(sums)
        found.append(sums.tolist())
    return found, train(engine, 0, 1)


def export(rank: int, folder: Path, pipe: int, output: Path) -> Any:
    engine = open_engine(folder, pipe)
    train(engine, 0, 2)
    engine.save_weights(weights_file := output.with_suffix(".safetensors"))
    if rank == 0:
        write_stages(ModelStages(folder), weights_file, output)
    weights = engine.full_weights()
    return weights if rank == 0 else None


def tied_copies(rank: int, folder: Path, pipe: int, dtype: torch.dtype) -> Any:
    """The curve, and the tied weight as this worker has it, if it does."""
    engine = open_engine(folder, pipe, dtype=dtype)
    curve = train(engine, 0, STEPS)
    weight = engine.names.get("model.embed_tokens.weight")
    return curve, None if weight is None else weight.detach().clone()


def count_passes(rank: int, folder: Path, pipe: int, options: dict[str, Any]) -> Any:
    """How often the MLPs of this stage's layers ran in a step, and the step's curve."""
    engine = open_engine(folder, pipe, **options)
    calls = []
    for name, module in engine.stages.skeleton.named_modules():
        if name.endswith(".mlp"):
            # Computing again ends inside of the last module whose input is wanted.
            module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    return len(calls), train(engine, 0, 1), len(calls)


def plain(folder: Path) -> tuple[list[list[float]], dict[str, Tensor]]:
    """The reference."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return plain_steps(model, adamw(dict(model.named_parameters())), 0, STEPS)


def plain_steps(
    model: Any, optimizer: torch.optim.Optimizer, first: int, last: int
) -> tuple[list[list[float]], dict[str, Tensor]]:
    curve = []
    for step in range(first, last):
        rows = sequences(step)
        batch = batch_of(rows)
        lengths_B = torch.tensor([len(ids_T) for ids_T, _ in rows])
        mask_BT = torch.arange(batch.input_ids_BT.shape[1])[None] < lengths_B[:, None]
        logits_BTV = model(batch.input_ids_BT, attention_mask=mask_BT.long()).logits
        loss = functional.cross_entropy(
            logits_BTV.flatten(0, 1), batch.labels_BT.flatten(), ignore_index=UNSUPERVISED
        )
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        curve.append([loss.item(), norm.item()])
    return curve, {name: parameter.detach() for name, parameter in model.named_parameters()}


def plain_half(
    model: nn.Module, tensors: Mapping[str, Tensor]
) -> tuple[list[list[float]], dict[str, Tensor]]:
    """The second half of a run by plain torch, from a checkpoint's tensors."""
    weights = dict(model.named_parameters())
    optimizer = adamw(weights)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[f"weights/{name}"])
            optimizer.state[weight] = {
                "step": torch.tensor(float(STEPS // 2)),
                "exp_avg": tensors[f"exp_avg/{name}"].clone(),
                "exp_avg_sq": tensors[f"exp_avg_sq/{name}"].clone(),
            }
    return plain_steps(model, optimizer, STEPS // 2, STEPS)


def finetuned(rank: int, target: Path, data: Path, output: Path, kept: Path, **train: Any) -> Any:
    """A run of fine-tuning on this worker: its figures; None if it was stopped at step 4."""
    stop_after = train.pop("stop_after", None)
    settings = {
        "global_batch_size": 6,
        "micro_batch_size": 2,
        "max_length": 20,
        "lr": 3e-3,
        "warmup_steps": 2,
        "epochs": 2,
        "eval_every": 3,
        "checkpoint_every": 4,
        "ema": 0.5,
        **train,
    }
    config = Config().replace(train=settings, tracking={"wandb": "disabled"})
    task = prepare_finetuning(config, str(target), data)
    host = FolderHost(kept, stop_after, rank, torch.distributed.get_world_size())
    try:
        return finetune(task, output, "run", host, torch.device("cpu"))
    except KeyboardInterrupt:
        return None


def finetuned_staged(rank: int, target: Path, data: Path, output: Path, kept: Path) -> Any:
    """In two stages, stopped after some steps."""
    return finetuned(
        rank, target, data, output, kept, parallelism="pipeline", num_workers=2, stop_after=4
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoWorkers]:
    with TwoWorkers(tmp_path_factory.mktemp("pair")) as workers:
        yield workers


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FourWorkers]:
    with FourWorkers(tmp_path_factory.mktemp("four")) as workers:
        yield workers


def same(found: Any, wanted: tuple[list[list[float]], dict[str, Tensor]], where: str) -> None:
    curve, weights = found
    for step, (ours, plain_step) in enumerate(zip(curve, wanted[0], strict=True)):
        assert ours == pytest.approx(plain_step, rel=LOSS_SHARE), f"{where} step {step}"
    assert list(weights) == list(wanted[1]), where
    for name, tensor in wanted[1].items():
        torch.testing.assert_close(
            weights[name], tensor, rtol=0, atol=WEIGHT_OFF, msg=f"{where} {name}"
        )


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_a_pipeline_trains_as_one_process_does(
    pair: TwoWorkers, four: FourWorkers, tmp_path: Path, name: str
) -> None:
    """Losses, gradient norms and final weights."""
    folder = save_tiny(tmp_path / "model", TINY_CONFIGS[name]())
    wanted = plain(folder)
    assert wanted[0][0][1] > CLIP, "clipping is at work"
    for workers, pipe, packing in ((pair, 2, False), (pair, 1, True), (four, 2, True)):
        found = workers(run, folder, pipe, packing)
        where = f"{name} {pipe}x{workers.count // pipe}"
        assert all(curve == found[0][0] for curve, _ in found), where
        same(found[0], wanted, where)


@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
def test_a_run_goes_on_with_another_topology(
    pair: TwoWorkers, four: FourWorkers, tmp_path: Path, name: str
) -> None:
    """Two stages, then data parallelism, one process, two of each; and plain torch's optimizer."""
    folder = save_tiny(tmp_path / "model", TINY_CONFIGS[name]())
    wanted = plain(folder)
    first, _ = pair(begin, folder, 2, tmp_path)
    undisturbed, _ = pair(run, folder, 2, False)
    results = {
        "2x1": pair(go_on, folder, 2, tmp_path)[0],
        "1x2": pair(go_on, folder, 1, tmp_path)[0],
        "1x1": go_on(0, folder, 1, tmp_path),
        "2x2": four(go_on, folder, 2, tmp_path)[0],
    }
    for where, (curve, weights) in results.items():
        same(([*first, *curve], weights), wanted, where)
    # With the same topology, to the bit.
    curve, weights = results["2x1"]
    assert [*first, *curve] == undisturbed[0]
    assert all(torch.equal(weights[key], undisturbed[1][key]) for key in weights)

    tensors = load_file(tmp_path / FILE)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    names = dict(model.named_parameters())
    assert set(tensors) == {f"{k}/{n}" for k in ("weights", "exp_avg", "exp_avg_sq") for n in names}
    same((*plain_half(model, tensors),), (wanted[0][STEPS // 2 :], wanted[1]), "plain")


def test_a_damaged_or_foreign_checkpoint_is_refused(pair: TwoWorkers, tmp_path: Path) -> None:
    """On all workers, with the same words, before a step is made."""
    folder = save_tiny(tmp_path / "model", TINY_CONFIGS["llama"]())
    pair(begin, folder, 2, tmp_path)
    path = tmp_path / FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-4000])
    for pipe in (2, 1):
        for message in pair(refused, folder, pipe, tmp_path):
            assert "the checkpoint is damaged" in message and str(path) in message
    path.write_bytes(whole[:50])
    assert "the checkpoint is damaged" in pair(refused, folder, 2, tmp_path)[0]
    path.unlink()
    assert "cannot be read" in pair(refused, folder, 2, tmp_path)[0]
    path.write_bytes(whole)
    other = save_tiny(tmp_path / "other", TINY_CONFIGS["qwen-3"]())
    messages = pair(refused, other, 2, tmp_path)
    assert all("of another model, method or optimizer" in message for message in messages)


def test_evaluation_counts_each_token_once_and_trains_nothing(
    pair: TwoWorkers, four: FourWorkers, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "model", TINY_CONFIGS["gpt-2"]())
    curve, _ = plain(folder)
    total = sum(int(mask_T[1:].sum()) for _, mask_T in sequences(0))
    for workers, pipe in ((pair, 2), (pair, 1), (four, 2)):
        for sums, first_step in workers(evaluate, folder, pipe):
            assert sums[0] == sums[1]
            assert sums[0][:2] == pytest.approx([curve[0][0] * total, total], rel=LOSS_SHARE)
            assert 0 <= sums[0][2] <= total
            assert first_step[0] == pytest.approx(curve[0], rel=LOSS_SHARE)


@pytest.mark.parametrize("name", ["mixtral", "gpt-2", "bloom-untied"])
def test_what_is_saved_is_an_hf_folder(
    pair: TwoWorkers, four: FourWorkers, tmp_path: Path, name: str
) -> None:
    folder = save_tiny(tmp_path / "model", TINY_CONFIGS[name]())
    start = load_file(folder / "model.safetensors")
    for workers, pipe in ((pair, 2), (four, 2)):
        output = tmp_path / f"saved-{workers.count}"
        weights = workers(export, folder, pipe, output)[0]
        stored = load_file(output / "model.safetensors")
        assert {n: t.shape for n, t in stored.items()} == {n: t.shape for n, t in start.items()}
        model, about = AutoModelForCausalLM.from_pretrained(
            output, dtype=torch.float32, output_loading_info=True
        )
        assert not about["missing_keys"] and not about["unexpected_keys"]
        for key, parameter in model.named_parameters():
            assert torch.equal(parameter, weights[key]), key
        assert model.config.to_diff_dict() == type(model.config).from_pretrained(
            folder
        ).to_diff_dict() | {"dtype": "float32"}


@pytest.mark.parametrize(
    ("dtype", "tolerance", "topologies"),
    [
        # Two stages of float32 are trained above.
        (torch.float32, LOSS_SHARE, [(4, 4, 2)]),
        # Eight bits of mantissa in every product; norms add the errors of all layers up.
        (torch.bfloat16, 0.1, [(2, 2, 2), (4, 2, 4), (4, 4, 2)]),
    ],
)
def test_copies_of_a_tied_weight_stay_the_same(
    pair: TwoWorkers,
    four: FourWorkers,
    tmp_path: Path,
    dtype: torch.dtype,
    tolerance: float,
    topologies: list[tuple[int, int, int]],
) -> None:
    """To the bit, on both stages that have one; of so many workers, stages and copies."""
    folder = save_tiny(tmp_path / "model", TINY_CONFIGS["llama-tied"]())
    wanted, _ = plain(folder)
    for count, pipe, number in topologies:
        workers = pair if count == pair.count else four
        found = workers(tied_copies, folder, pipe, dtype)
        copies = [copy for _, copy in found if copy is not None]
        assert len(copies) == number
        assert all(torch.equal(copy, copies[0]) for copy in copies)
        for ours, plain_step in zip(found[0][0], wanted, strict=True):
            assert ours == pytest.approx(plain_step, rel=tolerance), f"{pipe} of {count}"


def test_activations_are_computed_again_where_asked(pair: TwoWorkers, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", TINY_CONFIGS["qwen-3"]())
    kept = pair(count_passes, folder, 2, {})
    again = pair(count_passes, folder, 2, {"gradient_checkpointing": True})
    # Embedding and a layer; two layers and the head. Five micro-batches.
    passes = -(-ROWS // MICRO)
    assert [calls for _, _, calls in kept] == [passes, 2 * passes]
    assert [calls for _, _, calls in again] == [2 * passes, 4 * passes]
    assert again[0][1][0] == pytest.approx(kept[0][1][0], rel=1e-6)


def test_bad_parts_and_float16_on_cpu_are_refused_before_anything_loads(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", TINY_CONFIGS["llama"]())
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="adds up to 4, the model has 5 blocks"):
        open_engine(folder, 1, parts=[4])
    with pytest.raises(ConfigError, match="does not divide"):
        open_engine(folder, 2)
    with pytest.raises(ConfigError, match="float16 on CPU"):
        open_engine(folder, 1, dtype=torch.float16)


def test_fine_tuning_goes_from_a_pipeline_to_one_process(pair: TwoWorkers, tmp_path: Path) -> None:
    """The loop, its data, evaluation and moving average, against `ddp` from the first step on."""
    target = tiny_targets.save_tiny(tmp_path / "model", "llama", tied=True)
    data = tiny_targets.write_tiny_examples(tmp_path / "data", examples=24, held_out=5)
    ddp = {"parallelism": "ddp", "num_workers": 1}
    wanted = finetuned(0, target, data, tmp_path / "ddp", tmp_path / "ddp" / "kept", **ddp)
    kept = tmp_path / "staged" / "kept"
    assert pair(finetuned_staged, target, data, tmp_path / "staged", kept) == [None, None]
    found = finetuned(0, target, data, tmp_path / "staged", kept, **ddp)
    assert found["steps"] == wanted["steps"] == 8
    curves = [read_metrics(tmp_path / name) for name in ("staged", "ddp")]
    names = ("loss", "top1", "grad_norm", "held_out_loss", "held_out_top1")
    shared = [[[r[n] for n in names if n in r] for r in curve] for curve in curves]
    assert len(shared[0]) > 4
    # AdamW with its usual epsilon here.
    assert [pytest.approx(values, rel=1e-4) for values in shared[1]] == shared[0]
    folders = (tmp_path / name / "model" / "model.safetensors" for name in ("staged", "ddp"))
    ours, others = map(load_file, folders)
    for key, tensor in others.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-4, msg=key)
