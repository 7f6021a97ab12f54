from __future__ import annotations

import pytest
import torch
from torch import nn

from core.models.packed import PackedLinear, can_pack, linear, pack_linears

# Sums of 96 products of size about 1: in float32 another order costs up to 96 · 2⁻²⁴ ≈ 6e-6 of
# their size; in bfloat16 both round the same float32 sum to 8 bits, one step of 2⁻⁷ apart at most.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (7,), (1, 1), (2, 16), (3, 65)])
@torch.no_grad()
def test_packed_is_linear(dtype: torch.dtype, bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(96, 80, bias=bias).to(dtype)
    nn.init.normal_(plain.weight)
    packed = PackedLinear(plain.weight, plain.bias)
    x = torch.randn(*shape, 96).to(dtype)
    found, wanted = packed(x), plain(x)
    assert found.shape == wanted.shape and found.dtype == dtype
    near = TOLERANCE[dtype]
    torch.testing.assert_close(found, wanted, rtol=near, atol=near * 10)


def test_packed_keeps_no_reference_to_gradients() -> None:
    plain = nn.Linear(8, 4)
    packed = PackedLinear(plain.weight, plain.bias)
    assert not list(packed.parameters())
    assert not packed(torch.randn(2, 8)).requires_grad


def test_all_linear_layers_below_are_replaced() -> None:
    inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    module = nn.Sequential(inner, nn.LayerNorm(8), nn.Linear(8, 3, bias=False)).eval()
    x = torch.randn(5, 8)
    with torch.no_grad():
        before = module(x)
        assert pack_linears(module) == 2
        torch.testing.assert_close(module(x), before, rtol=1e-5, atol=1e-5)
    assert isinstance(module[2], PackedLinear) and isinstance(inner[0], PackedLinear)
    assert pack_linears(module) == 0


def test_what_cannot_be_packed_stays() -> None:
    half = nn.Linear(8, 8).half()
    assert not can_pack(half.weight)
    assert not can_pack(torch.empty(2, 2, device="meta"))
    module = nn.Sequential(half)
    assert pack_linears(module) == 0 and module[0] is half


@pytest.mark.parametrize("packed", [False, True])
def test_linear_of_given_weights(packed: bool) -> None:
    weight, bias = torch.randn(3, 8), torch.randn(3)
    layer = linear(weight, bias, packed=packed)
    assert isinstance(layer, PackedLinear) is packed
    assert not any(p.requires_grad for p in layer.parameters())
    x = torch.randn(2, 8)
    torch.testing.assert_close(layer(x), x @ weight.T + bias, rtol=1e-5, atol=1e-5)
