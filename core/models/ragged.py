"""Attention of several sequences of different lengths in one pass, without padding.

The new tokens of all sequences stand in one row, so that everything but attention is done once
for all of them. A cache of rows holds every sequence's keys and values in a stretch of its own;
attention reads each one's own rows in place, several sequences a call (`core/models/windows.py`).
Query heads that share a key head go through it as rows of one query, so that keys are not copied
for each head.

Registered as an attention of transformers, so that models stay unmodified. The reference is
transformers' own attention with `dense_mask`, over all rows of the cache.

Shapes: N new tokens of all sequences, T of one, C rows that a sequence's last token sees, n
sequences of a call (whose T and C are the most of theirs), Q query heads, G key heads, R = Q / G,
X = R · T, E head size, M rows of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from core.errors import InputError
from core.models.windows import Windows, plan_windows

NAME = "aerie_ragged"
# What some models pass to their attention, and what would be lost here.
FOREIGN = ("softcap", "s_aux", "position_bias")
# Where attention by products pays in bfloat16 on CPU, measured with 3 key heads of 64: from some
# 200 rows of context on for a tree of 8 tokens, and from 600 on for one token. Prompts' chunks
# stay with torch's kernel, which does not hold all scores at once.
SCORES_AT_LEAST, ROWS_AT_LEAST, MOST_TOKENS = 20_000, 9, 64
# A call takes as long to start as so many scores in it, measured for 16 sequences on 2 cores.
START_SCORES = 30_000


@dataclass(frozen=True)
class Span:
    """What the new tokens of one sequence see.

    Attributes:
        first: cache row where the sequence begins.
        context: rows from there on that all of its new tokens see.
        count: T, at least 1.
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
class _Call:
    """Attention of some sequences, which all layers do alike.

    Attributes:
        windows: what is read of the cache.
        tokens: which of the pass's new tokens ask, T for each of the n windows.
        query: [G, R, n, T, E].
        mask: additive [n, 1, X, C]; None where all is seen.
        by_products: whether two products do it, of a single window, in place of torch's kernel.
    """

    windows: Windows
    tokens: Tensor | slice
    query: tuple[int, ...]
    mask: Tensor | None
    by_products: bool

    def attend(
        self, query_QNE: Tensor, keys_GME: Tensor, values_GME: Tensor, scale: float
    ) -> Tensor:
        """Outputs [n · T, Q, E]."""
        if isinstance(self.tokens, slice):
            query = query_QNE[:, self.tokens].reshape(self.query)
        else:
            query = query_QNE.index_select(1, self.tokens).view(self.query)
        attend = _by_products if self.by_products else F.scaled_dot_product_attention
        out = attend(
            query.permute(2, 0, 1, 3, 4).flatten(2, 3),
            self._rows(keys_GME),
            self._rows(values_GME),
            attn_mask=self.mask,
            scale=scale,
        )
        groups, per_key, count, tokens, _ = self.query
        out = out.unflatten(2, (per_key, tokens)).permute(0, 3, 1, 2, 4)
        return out.reshape(count * tokens, groups * per_key, -1)

    def _rows(self, states_GME: Tensor) -> Tensor:
        """The windows [n, G, C, E], a view; values may have another E than keys."""
        windows, (group, row, element) = self.windows, states_GME.stride()
        groups, _, count, _, _ = self.query
        shape = (count, groups, windows.rows, states_GME.shape[2])
        strides = (windows.step * row, group, row, element)
        offset = states_GME.storage_offset() + windows.first * row
        return states_GME.as_strided(shape, strides, offset)


@dataclass(frozen=True, eq=False)
class RaggedBatch:
    """The sequences of one pass.

    What a cache holds behind a sequence may be read with it. Nothing comes of it, but it has to be
    finite: in float16, whose range a text can exceed, every sequence is read alone.

    Attributes:
        spans: in the order of their new tokens.
        plans: what is called, by all that it depends on; the layers share them.
    """

    spans: tuple[Span, ...]
    plans: dict[Any, tuple[list[_Call], Tensor | None]] = field(default_factory=dict)

    def attend(
        self, query_QNE: Tensor, keys_GME: Tensor, values_GME: Tensor, scale: float
    ) -> Tensor:
        """Outputs [N, Q, E] of new tokens whose keys the cache holds already."""
        calls, places_N = self._plan(query_QNE, keys_GME)
        outputs = [call.attend(query_QNE, keys_GME, values_GME, scale) for call in calls]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return output if places_N is None else output.index_select(0, places_N)

    def _plan(self, query: Tensor, keys: Tensor) -> tuple[list[_Call], Tensor | None]:
        """The calls, and which row of their outputs each new token's is, [N]; None if the same."""
        key = (query.shape, keys.shape, query.dtype, query.device)
        if key not in self.plans:
            self.plans[key] = self._planned(query, keys)
        return self.plans[key]

    def _planned(self, query: Tensor, keys: Tensor) -> tuple[list[_Call], Tensor | None]:
        groups, num_rows, size = keys.shape
        per_key, spans = query.shape[0] // groups, self.spans
        numbers = range(len(spans))
        products = {n for n in numbers if _products_pay(groups, per_key, spans[n], query)}
        far = query.dtype == torch.float16
        alone = products | {n for n in numbers if far or spans[n].count > MOST_TOKENS}
        plan = [Windows.of([number], spans) for number in alone]
        plan += plan_windows(
            spans,
            [number for number in numbers if number not in alone],
            num_rows,
            lambda rows, tokens: groups * rows * (per_key * tokens + ROWS_AT_LEAST),
            START_SCORES,
        )
        assert all(windows.end <= num_rows for windows in plan), "rows that the cache has not"
        begins = [0, *accumulate(span.count for span in spans)]
        calls, places, done = [], [0] * begins[-1], 0
        for windows in plan:
            count, tokens = len(windows.members), windows.tokens
            asking: list[int] = []
            for number in windows.members:
                begin, own, at = begins[number], spans[number].count, done + len(asking)
                places[begin : begin + own] = range(at, at + own)
                # Where a member has fewer than the others, its last one asks again.
                asking += [begin + min(t, own - 1) for t in range(tokens)]
            done += len(asking)
            calls.append(
                _Call(
                    windows=windows,
                    tokens=_as_slice(asking, query.device),
                    query=(groups, per_key, count, tokens, size),
                    mask=_additive([spans[n] for n in windows.members], windows, per_key, query),
                    by_products=products.issuperset(windows.members),
                )
            )
        same = places == list(range(done))
        return calls, None if same else torch.tensor(places, device=query.device)

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


def _by_products(
    query_nGXE: Tensor,
    keys_nGCE: Tensor,
    values_nGCE: Tensor,
    attn_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """What torch's kernel does, of a single window by two products: nothing of it is copied."""
    # Keys come first: oneDNN would bring a long second factor into another order.
    keys_GCE, query_GEX = keys_nGCE[0], (query_nGXE[0] * scale).transpose(1, 2)
    scores_GXC = torch.bmm(keys_GCE, query_GEX).transpose(1, 2)
    if attn_mask is not None:
        scores_GXC += attn_mask[0]
    return torch.bmm(scores_GXC.softmax(-1), values_nGCE[0])[None]


def _products_pay(groups: int, per_key: int, span: Span, query: Tensor) -> bool:
    """Whether products are the faster way: they cost more to start and less a score.

    torch's kernel computes bfloat16 at the speed of float32 on CPU.
    """
    if query.dtype != torch.bfloat16 or query.device.type != "cpu" or span.count > MOST_TOKENS:
        return False
    rows = per_key * span.count
    return groups * (span.end - span.first) * (rows + ROWS_AT_LEAST) >= SCORES_AT_LEAST


def _as_slice(numbers: list[int], device: torch.device) -> Tensor | slice:
    """An index of these numbers: nothing is copied where they follow each other."""
    begin, end = numbers[0], numbers[0] + len(numbers)
    if numbers == list(range(begin, end)):
        return slice(begin, end)
    return torch.tensor(numbers, device=device)


def _additive(spans: Sequence[Span], windows: Windows, per_key: int, like: Tensor) -> Tensor | None:
    """What the windows' scores get added, [n, 1, R · T, C]; None where every token sees all."""
    sees_n = [span.sees() for span in spans]
    full = all(span.end - span.first == windows.rows for span in spans)
    if (
        full
        and all(sees is None for sees in sees_n)
        and all(s.count == windows.tokens for s in spans)
    ):
        return None
    sees_nTC = torch.zeros(len(spans), windows.tokens, windows.rows, dtype=torch.bool)
    for span, sees_TT, sees_TC in zip(spans, sees_n, sees_nTC, strict=True):
        behind = span.end - span.first
        sees_TC[:, : span.context] = True
        # What the last one asks again sees as much, so that no score is without any weight.
        sees_TC[:, span.context : behind] = True if sees_TT is None else sees_TT[-1]
        if sees_TT is not None:
            sees_TC[: span.count, span.context : behind] = sees_TT
    mask = like.new_zeros(sees_nTC.shape).masked_fill_(~sees_nTC.to(like.device), float("-inf"))
    return mask[:, None].expand(-1, per_key, -1, -1).flatten(1, 2)[:, None]


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
