"""The chunked loss against autograd on whole logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from core.draft import soft_cross_entropy as module
from core.draft.soft_cross_entropy import Targets, product_dtype, soft_cross_entropy

ROWS, HIDDEN, VOCABULARY = 11, 6, 9


def _tensors(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    hidden_MH = torch.randn(ROWS, HIDDEN, generator=draw).to(dtype).requires_grad_()
    weight_WH = torch.randn(VOCABULARY, HIDDEN, generator=draw).to(dtype).requires_grad_()
    targets_MW = torch.randn(ROWS, VOCABULARY, generator=draw)
    best_M = torch.randint(-1, VOCABULARY, (ROWS,), generator=draw)
    return hidden_MH, weight_WH, targets_MW, best_M


def _writer(targets_MW: Tensor, best_M: Tensor | None) -> Targets:
    def write(part: slice, logits_CW: Tensor) -> Tensor | None:
        logits_CW.copy_(targets_MW[part])
        return None if best_M is None else best_M[part]

    return write


@pytest.mark.parametrize(("chunk_rows", "run_rows"), [(1, 1), (4, 3), (100, 2), (100, 100)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("best_is_given", [False, True])
def test_loss_gradients_and_ranks_are_those_of_whole_logits(
    monkeypatch: pytest.MonkeyPatch,
    chunk_rows: int,
    run_rows: int,
    weighted: bool,
    best_is_given: bool,
) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", chunk_rows)
    monkeypatch.setattr(module, "RUN_VALUES", run_rows * VOCABULARY)
    hidden_MH, weight_WH, targets_MW, best_M = _tensors(torch.float32)
    weights_M = torch.linspace(0, 2, ROWS) if weighted else None
    write = _writer(targets_MW, best_M if best_is_given else None)
    total, rank_M = soft_cross_entropy(hidden_MH, weight_WH, write, weights_M)
    logits_MW = hidden_MH @ weight_WH.T
    losses_M = -(targets_MW.softmax(-1) * logits_MW.log_softmax(-1)).sum(-1)
    wanted = (losses_M if weights_M is None else losses_M * weights_M).sum()
    torch.testing.assert_close(total, wanted)
    mine = torch.autograd.grad(3.0 * total, (hidden_MH, weight_WH))
    theirs = torch.autograd.grad(3.0 * wanted, (hidden_MH, weight_WH))
    for found, right in zip(mine, theirs, strict=True):
        torch.testing.assert_close(found, right)
    order_MW = logits_MW.argsort(-1, descending=True)
    wanted_M = best_M if best_is_given else targets_MW.argmax(-1)
    for row, best in enumerate(wanted_M.tolist()):
        rank = order_MW[row].tolist().index(best) if best >= 0 else VOCABULARY
        assert rank_M[row] == rank


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_a_frozen_weight_gets_no_gradient_and_bfloat16_is_near(
    monkeypatch: pytest.MonkeyPatch, products: torch.dtype
) -> None:
    """Whichever dtype this kind of processor multiplies bfloat16 in."""
    monkeypatch.setattr(module, "product_dtype", lambda like: products)
    hidden_MH, weight_WH, targets_MW, best_M = _tensors(torch.bfloat16)
    total, _ = soft_cross_entropy(hidden_MH, weight_WH.detach(), _writer(targets_MW, best_M))
    total.backward()
    assert weight_WH.grad is None
    assert hidden_MH.grad is not None and hidden_MH.grad.dtype == torch.bfloat16
    wide = hidden_MH.detach().float().requires_grad_()
    logits_MW = wide @ weight_WH.detach().float().T
    wanted = -(targets_MW.softmax(-1) * logits_MW.log_softmax(-1)).sum()
    wanted.backward()
    assert total.item() == pytest.approx(wanted.item(), rel=0.01)
    assert wide.grad is not None
    torch.testing.assert_close(hidden_MH.grad.float(), wide.grad, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("faster", "wanted"), [(False, torch.float32), (True, torch.bfloat16)])
def test_bfloat16_is_multiplied_in_float32_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, faster: bool, wanted: torch.dtype
) -> None:
    assert module.multiplies_bfloat16_faster() is module.multiplies_bfloat16_faster()
    monkeypatch.setattr(module, "multiplies_bfloat16_faster", lambda: faster)
    assert product_dtype(torch.zeros(1, dtype=torch.bfloat16)) == wanted
    assert product_dtype(torch.zeros(1, dtype=torch.bfloat16, device="meta")) == torch.bfloat16
    for dtype in (torch.float32, torch.float16):
        assert product_dtype(torch.zeros(1, dtype=dtype)) == dtype
