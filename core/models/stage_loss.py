"""The loss at the end of a pipeline, from what leaves the final norm.

Shapes: B rows, T tokens, H hidden, V vocabulary, S supervised tokens.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""The target of a token that is not supervised."""
LOSS_ROWS = 1024
"""Supervised tokens whose logits there are at a time."""


class StageLoss:
    """Cross-entropy of the supervised tokens, from what leaves the final norm.

    Attributes:
        scale: what losses are multiplied by before they go backward.
        sums: of each micro-batch since `start`, float64 [3]: losses, supervised tokens, and those
            of them that are the likeliest of all.
    """

    def __init__(self, head: nn.Module) -> None:
        """The head maps [S, H] to logits [S, V]."""
        self._head = head
        self.start(1.0)

    def start(self, scale: float) -> None:
        """Forget what was added up."""
        self.scale, self.sums = scale, cast(list[Tensor], [])

    def __call__(self, outputs: tuple[Tensor, Tensor], targets_BT: Tensor) -> Tensor:
        """The scaled sum of losses of one micro-batch; as DeepSpeed calls it."""
        supervised_BT = targets_BT != IGNORED
        hidden_SH, targets_S = outputs[0][supervised_BT], targets_BT[supervised_BT]
        # A micro-batch without a supervised token has a gradient too, of zeros.
        loss, hits = outputs[0].sum() * 0.0, torch.zeros((), device=targets_BT.device)
        for rows_SH, wanted_S in zip(
            hidden_SH.split(LOSS_ROWS), targets_S.split(LOSS_ROWS), strict=True
        ):
            # Logits are computed again in the backward pass, so that they are never whole.
            part, right = checkpoint(self._rows, rows_SH, wanted_S, use_reentrant=False)
            loss, hits = loss + part, hits + right
        found = (loss.detach(), supervised_BT.sum(), hits)
        self.sums.append(torch.stack([value.double() for value in found]))
        return loss * self.scale

    def _rows(self, hidden_SH: Tensor, targets_S: Tensor) -> tuple[Tensor, Tensor]:
        logits_SV = self._head(hidden_SH).float()
        hits = (logits_SV.detach().argmax(-1) == targets_S).sum()
        return functional.cross_entropy(logits_SV, targets_S, reduction="sum"), hits
