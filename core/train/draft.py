"""A draft head as it is trained. Shapes: V target vocabulary, H hidden, D depths."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from core.config import TrainConfig
from core.draft.base import DraftBatch, DraftHead
from core.train.engine import TrainingEngine
from core.train.evaluation import evaluate_draft
from core.train.trainee import LOSS, NUM_TOKENS, Batches, Trainee


class DraftTrainee(Trainee):
    """See `Trainee`; the loss is the algorithm's own."""

    def __init__(self, head: DraftHead, embedding_VH: Tensor, output_head_VH: Tensor) -> None:
        """The target's tensors are no part of the head: no engine moves or divides them."""
        super().__init__()
        self.head = head
        self._target = embedding_VH, output_head_VH

    def trained(self) -> dict[str, nn.Parameter]:
        """All of the head's."""
        return dict(self.head.named_parameters())

    def forward(self, batch: DraftBatch, chain_depth: int = 0) -> tuple[Tensor, Tensor]:
        """See `Trainee`; with a `chain_depth`, `DraftHead.chain_hits`: positions, and hits [D]."""
        if chain_depth:
            hits_D, positions = self.head.chain_hits(batch, chain_depth)
            return torch.as_tensor(positions), hits_D
        result = self.head.losses(batch)
        found = {LOSS: result.loss, NUM_TOKENS: result.num_tokens, **result.sums}
        return result.loss, self._statistics(found, result.loss.device)

    def settle(self) -> None:
        """Give the head the target's tensors, in its own dtype."""
        self.head.attach_target(*self._target)

    def recompute(self) -> None:
        """See `DraftHead.recomputes`."""
        self.head.recomputes = True

    def evaluate(
        self, engine: TrainingEngine, held_out: Batches, config: TrainConfig
    ) -> dict[str, float]:
        """With the accepted length, simulated on some of the sequences."""
        return evaluate_draft(engine, held_out, config)
