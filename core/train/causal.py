"""A causal language model as it is trained: its loss on the supervised tokens of conversations.

Shapes: B sequences, T tokens, K positions with something to predict, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.config import FinetuneConfig, TrainConfig
from core.data.examples import Example
from core.train.engine import TrainingEngine
from core.train.evaluation import mean_statistics, plan
from core.train.optimizers import optimizer_of
from core.train.order import Indices, Selection, seed_of
from core.train.trainee import LOSS, NUM_TOKENS, Batches, Trainee

UNSUPERVISED = -100
TOP1 = "top1"


class Examples(Protocol):
    """Examples by number, as `core.data.example_dataset.ExampleDataset` has them."""

    def __getitem__(self, index: int) -> Example: ...


@dataclass(frozen=True)
class CausalBatch:
    """Sequences, below each other with padding at the right, or behind each other in one row.

    Attributes:
        input_ids_BT: int64 [B, T]; B is 1 if they are packed.
        labels_BT: int64 [B, T], the token behind each place where it is supervised, else
            UNSUPERVISED; never the first token of another sequence.
        kept_K: int64 [K], the places where some row has a label: logits are computed there.
        attention_mask_BT: int64, 1 for tokens, 0 for padding; None if they are packed.
        position_ids_BT: int64, from 0 in each sequence; None if they are padded. transformers
            finds in them where sequences begin, and lets none see another.
        seed: of dropout.
    """

    input_ids_BT: Tensor
    labels_BT: Tensor
    kept_K: Tensor
    attention_mask_BT: Tensor | None
    position_ids_BT: Tensor | None
    seed: int


@dataclass(frozen=True)
class CausalBatches:
    """Makes batches of one split; see `Batches`."""

    source: Examples
    selection: Selection
    device: torch.device
    packing: bool
    seed: int = 0

    def announce(self, passes: Iterable[Indices]) -> None:
        """Nothing to get ready: examples are read from disk."""

    def batch(self, rows: Indices, step: int | None = None) -> CausalBatch:
        """The examples of these rows; what is dropped in them depends on seed, step and rows."""
        indices = self.selection.indices_N[rows].tolist()
        lengths = self.selection.lengths_N[rows].tolist()
        found = [self.source[index] for index in indices]
        seed = seed_of(self.seed, step or 0, indices[0])
        batch = collate(found, lengths, packing=self.packing, seed=seed)
        if self.device.type == "cpu":
            return batch
        values = {f.name: getattr(batch, f.name) for f in fields(batch)}
        moved: dict[str, Any] = {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        return CausalBatch(**moved)


def collate(
    examples: Sequence[Example], lengths: Sequence[int], *, packing: bool, seed: int = 0
) -> CausalBatch:
    """Cut examples to these lengths and put them into one batch."""
    ids, labels = [], []
    for example, length in zip(examples, lengths, strict=True):
        ids_T = torch.from_numpy(example.input_ids_T[:length].astype("int64"))
        supervised_T = torch.from_numpy(example.loss_mask_T[:length].astype(bool))
        following_T = ids_T.roll(-1).masked_fill(~supervised_T.roll(-1), UNSUPERVISED)
        following_T[-1] = UNSUPERVISED
        ids.append(ids_T)
        labels.append(following_T)
    if packing:
        input_ids_BT, labels_BT = torch.cat(ids)[None], torch.cat(labels)[None]
        mask_BT = None
        positions_BT = torch.cat([torch.arange(len(row)) for row in ids])[None]
    else:
        pad = nn.utils.rnn.pad_sequence
        input_ids_BT = pad(ids, batch_first=True)
        labels_BT = pad(labels, batch_first=True, padding_value=UNSUPERVISED)
        mask_BT = pad([torch.ones_like(row) for row in ids], batch_first=True)
        positions_BT = None
    kept_K = (labels_BT != UNSUPERVISED).any(0).nonzero()[:, 0]
    return CausalBatch(input_ids_BT, labels_BT, kept_K, mask_BT, positions_BT, seed)


class CausalTrainee(Trainee):
    """See `Trainee`; parameters that require gradients are trained."""

    names = (LOSS, NUM_TOKENS, TOP1)
    evaluated_first = True

    def __init__(self, model: nn.Module, finetune: FinetuneConfig) -> None:
        """Take a model as `core.models.adapters` loads it."""
        super().__init__()
        self.model = model
        self._finetune = finetune
        # DeepSpeed casts all that is floating, and rotary frequencies must not be rounded.
        self._exact = [
            (module, name, buffer.clone())
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_floating_point()
        ]

    def trained(self) -> dict[str, nn.Parameter]:
        """Those that require gradients; of tied ones, the first name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def forward(self, batch: CausalBatch, *arguments: Any) -> tuple[Tensor, Tensor]:
        """See `Trainee`."""
        if self.training:
            torch.manual_seed(batch.seed)
        where: dict[str, Tensor] = {}
        if batch.attention_mask_BT is not None:
            where["attention_mask"] = batch.attention_mask_BT
        if batch.position_ids_BT is not None:
            where["position_ids"] = batch.position_ids_BT
        logits_BKV = self.model(
            input_ids=batch.input_ids_BT, use_cache=False, logits_to_keep=batch.kept_K, **where
        ).logits
        labels_BK = batch.labels_BT[:, batch.kept_K]
        supervised_BK = labels_BK != UNSUPERVISED
        labels_N, logits_NV = labels_BK[supervised_BK], logits_BKV[supervised_BK].float()
        loss = F.cross_entropy(logits_NV, labels_N, reduction="sum")
        hits = (logits_NV.detach().argmax(-1) == labels_N).sum()
        count = torch.as_tensor(len(labels_N))
        found = {LOSS: loss, NUM_TOKENS: count, TOP1: hits}
        return loss, self._statistics(found, loss.device)

    def settle(self) -> None:
        """Put back what an engine has rounded besides weights."""
        for module, name, buffer in self._exact:
            module._buffers[name] = buffer.to(module._buffers[name].device)  # type: ignore[union-attr]

    def recompute(self) -> None:
        """By the model's own means, layer by layer."""
        model: Any = self.model
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def optimizer(self, config: TrainConfig) -> torch.optim.Optimizer:
        """Weight decay is for matrices: vectors are norms and biases, which it would bend."""
        found = list(self.trained().values())
        matrices = [parameter for parameter in found if parameter.ndim > 1]
        others = [parameter for parameter in found if parameter.ndim <= 1]
        groups = [
            {"params": group, "weight_decay": decay}
            for group, decay in ((matrices, config.weight_decay), (others, 0.0))
            if group
        ]
        return optimizer_of(groups, self._finetune.optimizer, config.lr, config.betas)

    def evaluate(
        self, engine: TrainingEngine, held_out: Batches, config: TrainConfig
    ) -> dict[str, float]:
        """Loss and share of tokens that the model holds for the likeliest."""
        passes = plan(
            held_out.selection,
            config,
            engine.data_rank,
            engine.data_size,
            equal=engine.equal_passes,
            drafts=False,
        )
        return mean_statistics(engine, held_out, passes)
