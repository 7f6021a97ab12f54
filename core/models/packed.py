"""Linear layers whose weights are packed once for oneDNN, on CPU.

`F.linear` repacks the weight at every call, which for a few tokens costs more than the product.
The packed layer is nearly flat in the number of tokens up to 16, so that verifying a small tree
costs little more than one step. The operators are torch's own but private: torch is pinned, and
the plain layer stays as fallback and reference (`target.pack_linear=false`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
        result: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self.bias, "none", [], ""
        )
        return result


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
    count = 0
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear and can_pack(child.weight):
            setattr(module, name, PackedLinear(child.weight, child.bias))
            count += 1
        else:
            count += pack_linears(child)
    return count
