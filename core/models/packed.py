"""Linear layers whose weights are packed once for oneDNN, on CPU.

`F.linear` repacks the weight at every call, which for a few tokens costs more than the product.
The packed layer is nearly flat in the number of tokens up to 16, so that verifying a small tree
costs little more than one step. The operators are torch's own but private: torch is pinned, and
the plain layer stays as fallback and reference (`target.pack_linear=false`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# torch keeps a description, and oneDNN a kernel, of every number of tokens that a layer has had:
# 0.7 MB each, a thousand by default, which a server whose batches change collects within minutes.
# These many take a quarter of that, and making one anew 2 ms. Read at the first product.
os.environ.setdefault("LRU_CACHE_CAPACITY", "256")
# A product is two of these.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")
# Layers of an attention that read the same.
SHARING = ("q_proj", "k_proj", "v_proj")


class PackedLinear(nn.Module):
    """`nn.Linear` for inference with a packed weight, which replaces the original.

    Input [..., in_features], output [..., out_features], in the weight's dtype.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Pack `weight` [out_features, in_features]; float32 or bfloat16, on CPU."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Product with the packed weight."""
        return self._product(x, "none")

    # What a product is followed by can be done to it while it is in registers.

    def silu(self, x: Tensor) -> Tensor:
        """SiLU of the product."""
        return self._product(x, "swish")

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """The product, by element, with `other` [..., out_features]."""
        return self._product_with(x, other, "mul")

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The product added to `other` [..., out_features]."""
        return self._product_with(x, other, "add")

    def _product(self, x: Tensor, then: str) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise.default(
            x, self._packed, self.bias, then, [], ""
        )
        return result

    def _product_with(self, x: Tensor, other: Tensor, then: str) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, other, self._packed, self.bias, then
        )
        return result


class SharedProduct:
    """One product in place of several with the same input; each layer's part is a slice of it.

    A product of a few tokens costs a start besides its weights; queries, keys and values share it.
    The product is kept until all parts have been taken, which are asked for with the same tensor.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        """Pack the layers' weights below each other."""
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        weight = torch.cat([layer.weight.detach() for layer in layers])
        self.layer = PackedLinear(weight, torch.cat(biases) if biases else None)
        self._parts = len(layers)
        self._untaken = 0
        self._input: Tensor | None = None
        self._output: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """The whole product, for one of the parts."""
        if self._input is not x or self._output is None:
            self._input, self._output, self._untaken = x, self.layer(x), self._parts
        output = self._output
        self._untaken -= 1
        if not self._untaken:
            self._input = self._output = None
        return output


class PartLinear(nn.Module):
    """`nn.Linear` for inference as a part of a shared product."""

    def __init__(self, shared: SharedProduct, first: int, out_features: int) -> None:
        """Columns of the product, from `first` on."""
        super().__init__()
        self.shared, self.first, self.out_features = shared, first, out_features
        self.in_features, self.dtype = shared.layer.in_features, shared.layer.dtype

    def forward(self, x: Tensor) -> Tensor:
        """This layer's columns, a view."""
        return self.shared.of(x)[..., self.first : self.first + self.out_features]


def can_pack(weight: Tensor) -> bool:
    """Whether this build of torch packs such a weight."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if weight.dtype == torch.bfloat16:
        # oneDNN needs AVX-512 or the like for it.
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def linear(weight: Tensor, bias: Tensor | None = None, *, packed: bool) -> nn.Module:
    """A linear layer without gradient, packed where that is asked for and possible."""
    if packed and can_pack(weight):
        return PackedLinear(weight, bias)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def pack_linears(module: nn.Module) -> int:
    """Replace every packable `nn.Linear` below `module` in place; returns how many."""
    count = _share(module)
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear and can_pack(child.weight):
            setattr(module, name, PackedLinear(child.weight, child.bias))
            count += 1
        else:
            count += pack_linears(child)
    return count


def _share(module: nn.Module) -> int:
    """Replace a module's query, key and value layers by one product; returns how many."""
    layers = [getattr(module, name, None) for name in SHARING]
    if not all(type(layer) is nn.Linear and can_pack(layer.weight) for layer in layers):
        return 0
    found = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if len({(layer.in_features, layer.weight.dtype, layer.bias is None) for layer in found}) > 1:
        return 0
    shared, first = SharedProduct(found), 0
    for name, layer in zip(SHARING, found, strict=True):
        setattr(module, name, PartLinear(shared, first, layer.out_features))
        first += layer.out_features
    return len(found)
