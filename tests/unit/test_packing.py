"""Tokens in one row: places, positions, and the way back."""

from __future__ import annotations

import torch

from core.draft.packing import Packing


def test_tokens_are_packed_row_by_row_and_come_back() -> None:
    taken_BT = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    x_BTH = torch.arange(32.0).view(4, 4, 2)
    packing = Packing.of(taken_BT)
    packed_NH = packing.pack(x_BTH)
    assert torch.equal(packed_NH, x_BTH[taken_BT])
    assert packing.positions_N.tolist() == [0, 1, 0, 1, 2, 3, 0]
    back = packing.unpack(packed_NH)
    assert torch.equal(back, torch.where(taken_BT[..., None], x_BTH, 0.0))


def test_gradients_go_to_the_places_they_came_from() -> None:
    taken_BT = torch.tensor([[True, False], [True, True]])
    x_BT = torch.ones(2, 2, 1, requires_grad=True)
    packing = Packing.of(taken_BT)
    (packing.unpack(packing.pack(x_BT) * torch.tensor([[1.0], [2.0], [3.0]])) ** 2).sum().backward()
    assert x_BT.grad is not None
    assert x_BT.grad[..., 0].tolist() == [[2.0, 0.0], [8.0, 18.0]]
