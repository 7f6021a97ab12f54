"""Attention of several sequences of different lengths in one pass, without padding.

The new tokens of all sequences stand in one row, so that everything but attention is done once
for all of them. A cache of rows holds every sequence's keys and values in a stretch of its own;
attention goes through the sequences and reads each one's own rows in place. Query heads that
share a key head go through it as rows of one query, so that keys are not copied for each head.

Registered as an attention of transformers, so that models stay unmodified. The reference is
transformers' own attention with `dense_mask`, over all rows of the cache.

Shapes: N new tokens of all sequences, T of one, C rows that a sequence's last token sees,
Q query heads, G key heads, R = Q / G, E head size, M rows of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from core.errors import InputError

NAME = "aerie_ragged"
# What some models pass to their attention, and what would be lost here.
FOREIGN = ("softcap", "s_aux", "position_bias")
# Where attention by products pays in bfloat16 on CPU, measured with 3 key heads of 64: from some
# 200 rows of context on for a tree of 8 tokens, and from 600 on for one token. Prompts' chunks
# stay with torch's kernel, which does not hold all scores at once.
SCORES_AT_LEAST, ROWS_AT_LEAST, MOST_TOKENS = 20_000, 9, 64


@dataclass(frozen=True)
class Span:
    """What the new tokens of one sequence see.

    Attributes:
        first: cache row where the sequence begins.
        context: rows from there on that all of its new tokens see.
        count: T.
        sees_TT: bool [T, C - context], which of the rows behind the context each token sees; None
            for ordinary causal attention, where those are the new tokens themselves.
    """

    first: int
    context: int
    count: int
    sees_TT: Tensor | None = None

    @property
    def end(self) -> int:
        """Cache row behind the last one that is seen."""
        behind = self.count if self.sees_TT is None else self.sees_TT.shape[1]
        return self.first + self.context + behind

    def sees(self) -> Tensor | None:
        """bool [T, C - context]; None where every token sees all."""
        if self.sees_TT is not None:
            return self.sees_TT
        if self.count == 1:
            return None
        return torch.ones(self.count, self.count, dtype=torch.bool).tril_()


@dataclass(frozen=True, eq=False)
class RaggedBatch:
    """The sequences of one pass.

    Attributes:
        spans: in the order of their new tokens.
        masks: additive, by sequence, device and so on; all layers share them.
    """

    spans: tuple[Span, ...]
    masks: dict[Any, Tensor | None] = field(default_factory=dict)

    def attend(
        self, query_QNE: Tensor, keys_GME: Tensor, values_GME: Tensor, scale: float
    ) -> Tensor:
        """Outputs [N, Q, E] of new tokens whose keys the cache holds already."""
        groups = len(keys_GME)
        per_key = len(query_QNE) // groups
        outputs, begin = [], 0
        for number, span in enumerate(self.spans):
            query = query_QNE[:, begin : begin + span.count]
            begin += span.count
            rows = slice(span.first, span.end)
            attend = _by_products if _products_pay(groups, per_key, span, query) else _by_kernel
            out = attend(
                query.reshape(groups, per_key * span.count, -1),
                keys_GME[:, rows],
                values_GME[:, rows],
                self._mask(number, per_key, query),
                scale,
            )
            out = out.view(groups, per_key, span.count, -1)
            outputs.append(out.permute(2, 0, 1, 3).flatten(1, 2))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _mask(self, number: int, per_key: int, query: Tensor) -> Tensor | None:
        """What a sequence's scores get added, [R · T, C]; None for nothing."""
        key = (number, per_key, query.dtype, query.device)
        if key not in self.masks:
            self.masks[key] = _additive(self.spans[number], per_key, query)
        return self.masks[key]

    def dense_mask(self, num_rows: int) -> Tensor:
        """bool [N, M], what every new token sees of a cache: the reference's mask."""
        dense = torch.zeros(sum(span.count for span in self.spans), num_rows, dtype=torch.bool)
        begin = 0
        for span in self.spans:
            tokens, behind = slice(begin, begin + span.count), span.first + span.context
            dense[tokens, span.first : behind] = True
            sees = span.sees()
            dense[tokens, behind : span.end] = True if sees is None else sees
            begin += span.count
        return dense


def _by_kernel(
    query_GXE: Tensor, keys_GCE: Tensor, values_GCE: Tensor, mask_XC: Tensor | None, scale: float
) -> Tensor:
    """Attention of the X rows that share keys, by torch's kernel: [G, X, E]."""
    (out_GXE,) = F.scaled_dot_product_attention(
        query_GXE[None], keys_GCE[None], values_GCE[None], attn_mask=mask_XC, scale=scale
    )
    return out_GXE


def _by_products(
    query_GXE: Tensor, keys_GCE: Tensor, values_GCE: Tensor, mask_XC: Tensor | None, scale: float
) -> Tensor:
    """The same by two products, for which nothing of the cache is copied."""
    # Keys come first: oneDNN would bring a long second factor into another order.
    scores_GXC = torch.bmm(keys_GCE, (query_GXE * scale).transpose(1, 2)).transpose(1, 2)
    if mask_XC is not None:
        scores_GXC += mask_XC
    return torch.bmm(scores_GXC.softmax(-1), values_GCE)


def _products_pay(groups: int, per_key: int, span: Span, query: Tensor) -> bool:
    """Whether products are the faster way: they cost more to start and less a score.

    torch's kernel computes bfloat16 at the speed of float32 on CPU.
    """
    if query.dtype != torch.bfloat16 or query.device.type != "cpu" or span.count > MOST_TOKENS:
        return False
    rows = per_key * span.count
    return groups * (span.end - span.first) * (rows + ROWS_AT_LEAST) >= SCORES_AT_LEAST


def _additive(span: Span, per_key: int, like: Tensor) -> Tensor | None:
    sees = span.sees()
    if sees is None:
        return None
    mask = like.new_zeros(per_key, span.count, span.end - span.first)
    mask[..., span.context :].masked_fill_(~sees.to(like.device), float("-inf"))
    return mask.flatten(0, 1)


def use_ragged_attention(model: PreTrainedModel) -> None:
    """Let a model take ragged batches; whatever else it is asked for stays torch's own kernel.

    Raises:
        InputError: its attention cannot be replaced.
    """
    if model.config._attn_implementation == NAME:
        return
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise InputError(
            f"target.path: {type(model).__name__} has an attention of its own, which cannot take "
            "several sequences at once; use a target that supports transformers' attention "
            "interface"
        )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    ragged: RaggedBatch | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers' attention functions; a ragged batch gets the whole cache as key and value.

    [1, Q, N, E] and [1, G, M, E] → [1, N, Q, E].
    """
    if ragged is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
        return output, None
    foreign = [name for name in FOREIGN if kwargs.get(name) is not None]
    if foreign:
        raise InputError(
            f"target.path: {type(module).__name__} attends with {', '.join(foreign)}, which is "
            "not supported; use another target"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return ragged.attend(query[0], key[0], value[0], scale)[None], None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
