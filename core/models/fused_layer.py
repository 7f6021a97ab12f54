"""A Llama-like decoder layer in few operators, on CPU, with packed weights.

For a few tokens, starting operators takes longer than reading the weights. Here queries, keys and
values are one product and one rotation, written to the cache at once; activation and residual
additions are done within products. The modules stay as they are and hold the weights; they are
the reference. What stands before attention is the caller's affair, so that a target's layers and
those of draft heads are the same to it.

Shapes: N new tokens, K of them that ask, I what attention reads, H hidden, Q query heads, G key
heads, A = Q + 2G, E head size, M rows of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.models.packed import PackedLinear, PartLinear
from core.models.ragged import RaggedBatch


@dataclass(frozen=True)
class FusedNorm:
    """Root mean square normalization."""

    weight: Tensor
    epsilon: float

    @classmethod
    def of(cls, module: object) -> FusedNorm | None:
        """The norm of a module that is one by the root mean square, or looks like HF's."""
        is_torch = isinstance(module, nn.RMSNorm)
        epsilon = getattr(module, "eps" if is_torch else "variance_epsilon", None)
        if not isinstance(module, nn.Module) or epsilon is None:
            return None
        return cls(module.get_parameter("weight").detach(), float(epsilon))

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


@dataclass(frozen=True)
class Heads:
    """How many query and key heads an attention has, and their size."""

    queries: int
    keys: int
    size: int

    def rotation(self, cos_NE: Tensor, sin_NE: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, [N, A, E] each, that turn queries and keys and leave values alone.

        The sine's first half is negated: it goes with the second half of what is turned.
        """
        turned, half = self.queries + self.keys, self.size // 2
        cos_NAE = cos_NE.new_ones(len(cos_NE), turned + self.keys, self.size)
        sin_NAE = torch.zeros_like(cos_NAE)
        cos_NAE[:, :turned] = cos_NE[:, None]
        sin_NAE[:, :turned] = sin_NE[:, None]
        sin_NAE[..., :half].neg_()
        return cos_NAE, sin_NAE


@dataclass(frozen=True)
class FusedLayer:
    """The weights of a decoder layer behind its first norm, as its modules hold them."""

    heads: Heads
    projection: PackedLinear
    query_norm: FusedNorm | None
    key_norm: FusedNorm | None
    output: PackedLinear
    second_norm: FusedNorm
    gate: PackedLinear
    up: PackedLinear
    down: PackedLinear
    scale: float

    @classmethod
    def of(
        cls, attention: nn.Module, mlp: nn.Module, second_norm: nn.Module, heads: Heads
    ) -> FusedLayer | None:
        """Take the weights of modules named as Llama's are; None where some are not packed.

        Whether they compute what Llama's do is for the caller to know.
        """
        attended, fed = cast(Any, attention), cast(Any, mlp)
        packed = [attended.o_proj, fed.gate_proj, fed.up_proj, fed.down_proj]
        if not isinstance(attended.q_proj, PartLinear):
            return None
        if not all(isinstance(part, PackedLinear) for part in packed):
            return None
        norm = FusedNorm.of(second_norm)
        own = [FusedNorm.of(getattr(attention, name, None)) for name in ("q_norm", "k_norm")]
        if norm is None or (own[0] is None) != (own[1] is None):
            return None
        return cls(
            heads=heads,
            projection=attended.q_proj.shared.layer,
            query_norm=own[0],
            key_norm=own[1],
            output=attended.o_proj,
            second_norm=norm,
            gate=fed.gate_proj,
            up=fed.up_proj,
            down=fed.down_proj,
            scale=getattr(attention, "scaling", heads.size**-0.5),
        )

    def __call__(
        self,
        x_NI: Tensor,
        residual_NH: Tensor,
        turn: tuple[Tensor, Tensor],
        buffer: Tensor,
        rows_N: Tensor,
        ragged: RaggedBatch,
        asking_K: Tensor | None = None,
    ) -> Tensor:
        """States behind the layer, [K, H].

        Args:
            x_NI: what attention reads.
            residual_NH: what is added to what it finds.
            turn: as `Heads.rotation` gives it for the positions.
            buffer: keys and values of the cache [2G, M, E], keys first; takes the new ones in.
            rows_N: int64 [N], where.
            ragged: what those that ask see.
            asking_K: int64 [K], which of the N ask; None for all.
        """
        queries, keys = self.heads.queries, self.heads.keys
        heads_NAE = self.projection(x_NI).view(len(x_NI), -1, self.heads.size)
        if self.query_norm is not None and self.key_norm is not None:
            query, key, value = heads_NAE.split((queries, keys, keys), dim=1)
            heads_NAE = torch.cat((self.query_norm(query), self.key_norm(key), value), dim=1)
        halves = heads_NAE.view(*heads_NAE.shape[:2], 2, -1)
        cos_NAE, sin_NAE = turn
        heads_NAE = torch.addcmul(heads_NAE * cos_NAE, halves.flip(2).flatten(2), sin_NAE)
        buffer.index_copy_(1, rows_N, heads_NAE[:, queries:].transpose(0, 1))
        if asking_K is not None:
            heads_NAE, residual_NH = heads_NAE[asking_K], residual_NH[asking_K]
        out_KQE = ragged.attend(
            heads_NAE[:, :queries].transpose(0, 1), buffer[:keys], buffer[keys:], self.scale
        )
        x_KH = self.output.plus(out_KQE.flatten(1), residual_NH)
        normed_KH = self.second_norm(x_KH)
        return self.down.plus(self.up.times(normed_KH, self.gate.silu(normed_KH)), x_KH)
