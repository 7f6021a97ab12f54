from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from core.models.packed import PackedLinear, PartLinear, can_pack, linear, pack_linears

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


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@torch.no_grad()
def test_what_follows_a_product(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(96, 80).to(dtype)
    packed = PackedLinear(plain.weight, plain.bias)
    x, other = torch.randn(5, 96).to(dtype), torch.randn(5, 80).to(dtype)
    product = nn.functional.linear(x.float(), plain.weight.float(), plain.bias.float())
    near = TOLERANCE[dtype]
    for found, wanted in (
        (packed.silu(x), nn.functional.silu(product)),
        (packed.times(x, other), product * other.float()),
        (packed.plus(x, other), product + other.float()),
    ):
        torch.testing.assert_close(found.float(), wanted, rtol=near, atol=near * 2)


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_queries_keys_and_values_are_one_product(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    names = {"q_proj": 12, "k_proj": 4, "v_proj": 4}
    module = nn.ModuleDict({name: nn.Linear(8, size, bias=bias) for name, size in names.items()})
    inputs = [torch.randn(2, 3, 8), torch.randn(1, 8)]
    wanted = [{name: module[name](x) for name in names} for x in inputs]
    assert pack_linears(module) == 3
    assert all(type(module[name]) is PartLinear for name in names)
    products: list[torch.Size] = []
    computed = PackedLinear.forward

    def counted(self: PackedLinear, x: torch.Tensor) -> torch.Tensor:
        products.append(x.shape)
        return computed(self, x)

    monkeypatch.setattr(PackedLinear, "forward", counted)
    for x, expected in zip(inputs, wanted, strict=True):
        for name in ("k_proj", "q_proj", "v_proj"):
            torch.testing.assert_close(module[name](x), expected[name], rtol=1e-5, atol=1e-5)
    assert products == [x.shape for x in inputs]
    # All parts are taken, so nothing is kept: the same tensor with other contents counts anew.
    inputs[1].zero_()
    found = torch.cat([module[name](inputs[1]) for name in names], dim=-1)
    part = module["q_proj"]
    assert isinstance(part, PartLinear)
    shared = part.shared.layer.bias
    torch.testing.assert_close(found[0], torch.zeros(20) if shared is None else shared)


def test_layers_that_do_not_share_an_input_are_packed_alone() -> None:
    sizes = {"q_proj": 8, "k_proj": 16, "v_proj": 8}
    module = nn.ModuleDict({name: nn.Linear(size, 4) for name, size in sizes.items()})
    assert pack_linears(module) == 3
    assert all(type(module[name]) is PackedLinear for name in sizes)


# In a process of its own: how much is kept is settled at the first product.
GROWTH_MB = """
import torch
from core.models.packed import PackedLinear

def resident_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6

layer, found = PackedLinear(torch.randn(64, 64)), []
for tokens in range(1, 901):
    layer(torch.randn(tokens, 64))
    if tokens in (300, 900):
        found.append(resident_mb())
print(found[1] - found[0])
"""


@pytest.mark.skipif(not can_pack(torch.zeros(2, 2)), reason="this torch packs nothing")
@pytest.mark.skipif(sys.platform != "linux", reason="reads resident memory from /proc")
def test_other_numbers_of_tokens_do_not_use_up_memory() -> None:
    """As torch comes, these 600 would keep some 400 MB."""
    # Which this process has set, as it has imported them.
    own = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    run = subprocess.run(
        [sys.executable, "-c", GROWTH_MB],
        env={name: value for name, value in os.environ.items() if name not in own},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(run.stdout) < 150
