"""The chunked loss against autograd on whole logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from core.draft import soft_cross_entropy as module
from core.draft.soft_cross_entropy import soft_cross_entropy

ROWS, HIDDEN, VOCABULARY = 11, 6, 9


def _tensors(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    hidden_MH = torch.randn(ROWS, HIDDEN, generator=draw).to(dtype).requires_grad_()
    weight_WH = torch.randn(VOCABULARY, HIDDEN, generator=draw).to(dtype).requires_grad_()
    probs_MW = torch.randn(ROWS, VOCABULARY, generator=draw).softmax(-1)
    best_M = torch.randint(-1, VOCABULARY, (ROWS,), generator=draw)
    return hidden_MH, weight_WH, probs_MW, best_M


@pytest.mark.parametrize("chunk_rows", [1, 4, 100])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_gradients_and_ranks_are_those_of_whole_logits(
    monkeypatch: pytest.MonkeyPatch, chunk_rows: int, weighted: bool
) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", chunk_rows)
    hidden_MH, weight_WH, probs_MW, best_M = _tensors(torch.float32)
    weights_M = torch.linspace(0, 2, ROWS) if weighted else None
    total, rank_M = soft_cross_entropy(
        hidden_MH, weight_WH, lambda part: (probs_MW[part], best_M[part]), weights_M
    )
    logits_MW = hidden_MH @ weight_WH.T
    losses_M = -(probs_MW * logits_MW.log_softmax(-1)).sum(-1)
    wanted = (losses_M if weights_M is None else losses_M * weights_M).sum()
    torch.testing.assert_close(total, wanted)
    mine = torch.autograd.grad(3.0 * total, (hidden_MH, weight_WH))
    theirs = torch.autograd.grad(3.0 * wanted, (hidden_MH, weight_WH))
    for found, right in zip(mine, theirs, strict=True):
        torch.testing.assert_close(found, right)
    order_MW = logits_MW.argsort(-1, descending=True)
    for row, best in enumerate(best_M.tolist()):
        rank = order_MW[row].tolist().index(best) if best >= 0 else VOCABULARY
        assert rank_M[row] == rank


def test_a_frozen_weight_gets_no_gradient_and_bfloat16_is_near() -> None:
    hidden_MH, weight_WH, probs_MW, best_M = _tensors(torch.bfloat16)
    total, _ = soft_cross_entropy(
        hidden_MH, weight_WH.detach(), lambda part: (probs_MW[part], best_M[part])
    )
    total.backward()
    assert weight_WH.grad is None
    assert hidden_MH.grad is not None
    wide = hidden_MH.detach().float().requires_grad_()
    logits_MW = wide @ weight_WH.detach().float().T
    wanted = -(probs_MW * logits_MW.log_softmax(-1)).sum()
    wanted.backward()
    assert total.item() == pytest.approx(wanted.item(), rel=0.01)
    assert wide.grad is not None
    torch.testing.assert_close(hidden_MH.grad.float(), wide.grad, rtol=0.05, atol=0.05)
