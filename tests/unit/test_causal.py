"""The loss of a language model: packed, padded, in parts, and what is decayed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from core.config import FinetuneConfig, TrainConfig
from core.models.adapters import load_for_training
from core.train.causal import UNSUPERVISED, CausalTrainee, collate
from tests.tiny_targets import ARCHITECTURES, random_examples, save_tiny

PACKED = [name for name in ARCHITECTURES if name != "bloom"]
FULL = FinetuneConfig()


def _trainee(tmp_path: Path, architecture: str, **settings: object) -> CausalTrainee:
    folder = save_tiny(tmp_path / architecture, architecture)
    finetune = FinetuneConfig.model_validate(settings)
    return CausalTrainee(load_for_training(folder, finetune, torch.float32), finetune)


def _gradients(trainee: CausalTrainee, losses: list[Tensor]) -> dict[str, Tensor]:
    trainee.zero_grad()
    for loss in losses:
        loss.backward()
    found = {n: p.grad.clone() for n, p in trainee.trained().items() if p.grad is not None}
    assert found.keys() == trainee.trained().keys()
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_loss_is_plain_cross_entropy_of_supervised_tokens(
    tmp_path: Path, architecture: str
) -> None:
    trainee = _trainee(tmp_path, architecture)
    examples = random_examples(5)
    loss, statistics = trainee(collate(examples, [e.num_tokens for e in examples], packing=False))
    wanted, hits, count = torch.zeros(()), 0, 0
    for example in examples:
        ids_T = torch.from_numpy(example.input_ids_T.astype("int64"))
        logits_TV = trainee.model(ids_T[None]).logits[0].detach()
        for place in range(1, len(ids_T)):
            if example.loss_mask_T[place]:
                wanted = wanted + F.cross_entropy(logits_TV[place - 1], ids_T[place])
                hits += int(logits_TV[place - 1].argmax() == ids_T[place])
                count += 1
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-5, atol=1e-4)
    assert statistics.tolist() == pytest.approx([float(wanted), count, hits], rel=1e-5)


@pytest.mark.parametrize("architecture", PACKED)
def test_packed_sequences_have_the_loss_and_gradients_of_padded_ones(
    tmp_path: Path, architecture: str
) -> None:
    trainee = _trainee(tmp_path, architecture).train()
    examples = random_examples(6)
    lengths = [example.num_tokens - 1 for example in examples]
    padded, packed = (collate(examples, lengths, packing=packing) for packing in (False, True))
    assert padded.input_ids_BT.shape == (6, max(lengths))
    assert packed.input_ids_BT.shape == (1, sum(lengths))
    results = [trainee(batch) for batch in (padded, packed)]
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-5, atol=1e-4)
    wanted, found = (_gradients(trainee, [result[0]]) for result in results)
    for name, gradient in wanted.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-5 * scale + 1e-7, msg=name
        )


def test_accumulated_unequal_passes_are_one_large_batch(tmp_path: Path) -> None:
    trainee = _trainee(tmp_path, "llama")
    examples = random_examples(7)
    lengths = [example.num_tokens for example in examples]
    whole = trainee(collate(examples, lengths, packing=True))
    total = float(whole[1][1])
    parts = [
        trainee(collate(examples[part], lengths[part], packing=True))
        for part in (slice(0, 1), slice(1, 5), slice(5, 7))
    ]
    counts = [float(statistics[1]) for _, statistics in parts]
    assert len(set(counts)) == 3 and sum(counts) == total
    wanted = _gradients(trainee, [whole[0] / total])
    found = _gradients(trainee, [loss / total for loss, _ in parts])
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_what_stands_before_a_sequence_and_what_nobody_learns_is_no_label() -> None:
    examples = random_examples(2)
    for example in examples:
        example.loss_mask_T[0] = 1
    batch = collate(examples, [8, 5], packing=True)
    ids = np.concatenate([examples[0].input_ids_T[:8], examples[1].input_ids_T[:5]])
    labels = batch.labels_BT[0].tolist()
    assert labels[7] == labels[12] == UNSUPERVISED
    for place, label in enumerate(labels):
        if label != UNSUPERVISED:
            assert label == ids[place + 1]
    supervised = sum(int(e.loss_mask_T[1:n].sum()) for e, n in zip(examples, (8, 5), strict=True))
    assert sum(label != UNSUPERVISED for label in labels) == supervised == len(batch.kept_K)
    assert batch.position_ids_BT is not None
    assert batch.position_ids_BT[0].tolist() == [*range(8), *range(5)]


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_matrices_alone_decay(tmp_path: Path, optimizer: str) -> None:
    """A step without gradients to speak of shows the decay alone."""
    trainee = _trainee(tmp_path, "gpt2", optimizer=optimizer)
    config = TrainConfig(lr=0.1, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in trainee.trained().items()}
    made = trainee.optimizer(config)
    for parameter in trainee.trained().values():
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    shapes = set()
    for name, parameter in trainee.trained().items():
        share = 0.95 if parameter.ndim > 1 else 1.0
        torch.testing.assert_close(parameter.data, before[name] * share, msg=name)
        shapes.add(parameter.ndim)
    assert shapes == {1, 2}


def test_dropout_depends_on_seed_step_and_rows_alone(tmp_path: Path) -> None:
    trainee = _trainee(tmp_path, "llama", method="lora", dropout=0.5, rank=4).train()
    for name, parameter in trainee.trained().items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    examples = random_examples(3)
    lengths = [example.num_tokens for example in examples]

    def loss(seed: int) -> float:
        return float(trainee(collate(examples, lengths, packing=True, seed=seed))[0].detach())

    assert loss(1) == loss(1) != loss(2)
    trainee.eval()
    assert loss(1) == loss(2)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_recomputing_changes_no_gradient(tmp_path: Path, method: str) -> None:
    examples = random_examples(3)
    lengths = [example.num_tokens for example in examples]
    trainee = _trainee(tmp_path, "llama", method=method).train()
    kept = _gradients(trainee, [trainee(collate(examples, lengths, packing=True))[0]])
    trainee.recompute()
    again = _gradients(trainee, [trainee(collate(examples, lengths, packing=True))[0]])
    for name, gradient in kept.items():
        torch.testing.assert_close(again[name], gradient, msg=name)
