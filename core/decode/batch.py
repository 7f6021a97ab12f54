"""Plain decoding of many prompts at once: a batch whose rows are refilled as they end.

Rows of a batch share the cache's slots: each pass writes one slot for every row, and a mask says
which slots are a row's own. So a prompt can take a row over at any time, into the first slots,
without moving the others. When the slots are used up, each row's own move together.

A row draws with random numbers of its own, and its logits are those of its sequence alone up to
rounding: what it says depends neither on its neighbours nor on when it started.

Shapes: B rows, C slots, P prompt tokens, V vocabulary, K candidates.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from core.data.batches import pad_right, plan_batches
from core.decode.cache import SequenceCache
from core.decode.sampling import SamplingSettings
from core.models.target import Target

# Candidates that are sorted at first; nearly always they hold top_p of the distribution.
FIRST_CANDIDATES = 512
# Slots beyond the longest sequence's, so that rows seldom have to move together.
SPARE_SLOTS = 64
# Most tokens of a pass over prompts, padding included.
PREFILL_TOKENS = 4096
# Prompts come in once this share of the rows is free: one pass for several of them.
REFILL_SHARE = 1 / 4


@dataclass(frozen=True)
class Request:
    """A prompt to answer.

    Attributes:
        key: whatever the caller knows it by.
        prompt_ids: at least one token.
        max_new_tokens: exact upper limit, at least 1.
        seed: of its random numbers.
    """

    key: Any
    prompt_ids: Sequence[int]
    max_new_tokens: int
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """Generated tokens, without the one that ended them; `cut` if none did."""

    token_ids: tuple[int, ...]
    cut: bool


@dataclass
class BatchCounts:
    """What a generation computed.

    Attributes:
        prompt_tokens: read.
        padded_prompt_tokens: the same with padding.
        new_tokens: generated, end tokens included.
        decoded_tokens: those of them that a decoding pass gave; each prompt's first is not.
        decoded_rows: rows of all decoding passes, idle ones included.
        passes: of the target.
    """

    prompt_tokens: int = 0
    padded_prompt_tokens: int = 0
    new_tokens: int = 0
    decoded_tokens: int = 0
    decoded_rows: int = 0
    passes: int = 0


FollowUp = Callable[[Request, Answer], Request | None]


@dataclass
class _Row:
    request: Request
    random: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    length: int = 0


class BatchGenerator:
    """Answers prompts with one target; not thread-safe.

    Attributes:
        counts: summed over all calls of `run`.
    """

    def __init__(
        self,
        target: Target,
        settings: SamplingSettings,
        batch_size: int,
        stop_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        """Get ready.

        Args:
            target: loaded by `load_target`.
            settings: how tokens are chosen.
            batch_size: rows.
            stop_token_ids: besides the target's end tokens.
        Raises:
            InputError: an architecture whose logits `Target.logits` does not give.
        """
        target.check_output_head()
        self.target, self.settings, self.batch_size = target, settings, batch_size
        self.stops = target.eos_token_ids | stop_token_ids
        self.counts = BatchCounts()

    @torch.inference_mode()
    def run(self, requests: Sequence[Request], follow_up: FollowUp) -> None:
        """Answer all requests, and those that follow from the answers.

        Args:
            requests: in any order; the longest prompts start first.
            follow_up: is given each answer, and returns what is to be asked after it, if anything.
        """
        waiting = _Waiting(requests)
        while waiting:
            rows = _Rows(self, waiting.take(self.batch_size))
            while rows.active:
                for request, answer in rows.ended():
                    following = follow_up(request, answer)
                    if following is not None:
                        waiting.add(following)
                rows.refill(waiting)
                if rows.active:
                    rows.step()


class _Waiting:
    """Requests, longest prompt first, then in order of arrival."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests: list[tuple[int, int, Request]] = []
        self._arrived = 0
        for request in requests:
            self.add(request)

    def add(self, request: Request) -> None:
        self._arrived += 1
        # The number of arrival is unique: requests themselves are never compared.
        bisect.insort(self._requests, (len(request.prompt_ids), -self._arrived, request))

    def take(self, count: int) -> list[Request]:
        return [self._requests.pop()[2] for _ in range(min(count, len(self._requests)))]

    def __len__(self) -> int:
        return len(self._requests)


class _Rows:
    """A batch in the making: its rows, their cache, and which slots are whose."""

    def __init__(self, generator: BatchGenerator, requests: list[Request]) -> None:
        self.generator, self.target = generator, generator.target
        self.num_slots = _slots_for(requests)
        self.rows: list[_Row | None] = [None] * len(requests)
        self._done: list[_Row] = []
        self._cache = SequenceCache(self.target.model.config, self.num_slots)
        self._own_BC = torch.zeros(len(requests), self.num_slots, dtype=torch.bool)
        self._last_B = torch.zeros(len(requests), dtype=torch.int64)
        self._fill(range(len(requests)), requests)

    @property
    def active(self) -> int:
        """Rows that are at work, and ended ones that nobody has asked for yet."""
        return sum(row is not None for row in self.rows) + len(self._done)

    def ended(self) -> list[tuple[Request, Answer]]:
        """Requests that have been answered since the last call."""
        found, self._done = self._done, []
        limit = self.generator.stops
        return [
            (row.request, Answer(tuple(row.tokens[:-1]), cut=False))
            if row.tokens[-1] in limit
            else (row.request, Answer(tuple(row.tokens), cut=True))
            for row in found
        ]

    def refill(self, waiting: _Waiting) -> None:
        """Start waiting requests in free rows; without any, give up rows that stay free."""
        free = [number for number, row in enumerate(self.rows) if row is None]
        if not waiting:
            if len(free) * 2 >= len(self.rows) and len(free) < len(self.rows):
                self._keep([number for number, row in enumerate(self.rows) if row is not None])
            return
        if len(free) < max(1, int(len(self.rows) * REFILL_SHARE)):
            return
        requests = waiting.take(len(free))
        self._grow(_slots_for(requests))
        self._fill(free, requests)

    def _fill(self, numbers: Sequence[int], requests: Sequence[Request]) -> None:
        """Start requests in rows; prompts of similar length are read together."""
        lengths = [len(request.prompt_ids) for request in requests]
        for batch in plan_batches(lengths, PREFILL_TOKENS).batches:
            self._start([numbers[i] for i in batch], [requests[i] for i in batch])

    def _start(self, numbers: Sequence[int], requests: Sequence[Request]) -> None:
        cache, own_BP, hidden_BH = self._read(requests)
        longest, places = own_BP.shape[1], torch.tensor(numbers)
        for mine, theirs in zip(self._cache.layers, cache.layers, strict=True):
            if not mine.is_initialized:
                # As many rows as the batch will have; none of their slots is in use yet.
                like = theirs.keys[:1, :, :0].expand(len(self.rows), -1, -1, -1)
                mine.lazy_initialization(like, like)
        self._reserve(longest)
        for mine, theirs in zip(self._cache.layers, cache.layers, strict=True):
            on = places.to(mine.keys.device)
            mine.keys[on, :, :longest] = theirs.keys
            mine.values[on, :, :longest] = theirs.values
        self._own_BC[places] = False
        self._own_BC[places, :longest] = own_BP
        for number, request in zip(numbers, requests, strict=True):
            self.rows[number] = _Row(request, np.random.default_rng(request.seed))
        self._take(numbers, hidden_BH)

    def step(self) -> None:
        """One pass: a token more for every row."""
        if self._cache.length == self.num_slots:
            self._move_together()
        end = self._cache.length + 1
        positions_B = self._own_BC.sum(1)
        busy = [number for number, row in enumerate(self.rows) if row is not None]
        # Free rows are computed along, and keep nothing of it.
        self._own_BC[busy, end - 1] = True
        hidden_BH = self._pass(
            self._last_B[:, None], positions_B[:, None], self._own_BC[:, :end], self._cache
        )[:, 0]
        self.generator.counts.decoded_rows += len(self.rows)
        self.generator.counts.decoded_tokens += len(busy)
        self._take(busy, hidden_BH[busy])

    def _take(self, numbers: Sequence[int], hidden_BH: Tensor) -> None:
        """Choose the next token of some rows, from their last hidden states [len(numbers), H]."""
        rows = [cast(_Row, self.rows[number]) for number in numbers]
        logits_BV = self.target.logits(hidden_BH).float().cpu()
        settings = self.generator.settings
        randoms = [0.0 if settings.greedy else row.random.random() for row in rows]
        for number, row, token in zip(
            numbers, rows, choose(logits_BV, settings, randoms), strict=True
        ):
            row.tokens.append(token)
            self._last_B[number] = token
            if token in self.generator.stops or len(row.tokens) == row.request.max_new_tokens:
                self._done.append(row)
                self.rows[number] = None
        self.generator.counts.new_tokens += len(rows)

    def _read(self, requests: Sequence[Request]) -> tuple[SequenceCache, Tensor, Tensor]:
        """Prompts into a new cache; their slots bool [B, P], and the last hidden states [B, H]."""
        prompts = [np.asarray(request.prompt_ids, dtype=np.int32) for request in requests]
        input_ids_BP, mask_BP = pad_right(prompts)
        own_BP = torch.ones_like(input_ids_BP) if mask_BP is None else mask_BP
        cache = SequenceCache(self.target.model.config, own_BP.shape[1])
        positions_BP = torch.arange(input_ids_BP.shape[1]).expand_as(input_ids_BP)
        hidden_BPH = self._pass(input_ids_BP, positions_BP, own_BP.bool(), cache)
        lengths_B = own_BP.sum(1)
        counts = self.generator.counts
        counts.prompt_tokens += int(lengths_B.sum())
        counts.padded_prompt_tokens += input_ids_BP.numel()
        last = (lengths_B - 1).to(hidden_BPH.device)
        return cache, own_BP.bool(), hidden_BPH[torch.arange(len(requests)), last]

    def _pass(
        self, input_ids_BT: Tensor, positions_BT: Tensor, own_BC: Tensor, cache: SequenceCache
    ) -> Tensor:
        """Final hidden states [B, T, H] of T tokens appended to the cache."""
        device = self.target.device
        self.generator.counts.passes += 1
        output = cast(Any, self.target.model.base_model)(
            input_ids=input_ids_BT.to(device),
            position_ids=positions_BT.to(device),
            attention_mask=own_BC.long().to(device),
            past_key_values=cache,
            use_cache=True,
        )
        hidden_BTH: Tensor = output.last_hidden_state
        return hidden_BTH

    def _reserve(self, slots: int) -> None:
        """Have at least so many slots in use; new ones are zero, since 0 · NaN is no zero."""
        used = self._cache.length
        if used < slots:
            for layer in self._cache.layers:
                layer.keys[:, :, used:slots] = 0
                layer.values[:, :, used:slots] = 0
            self._cache.rewind(slots)

    def _grow(self, num_slots: int) -> None:
        """Make room for so many slots; what was answered earlier may be longer than all before."""
        more = num_slots - self.num_slots
        if more <= 0:
            return
        for layer in self._cache.layers:
            layer.keys = torch.nn.functional.pad(layer.keys, (0, 0, 0, more))
            layer.values = torch.nn.functional.pad(layer.values, (0, 0, 0, more))
        self._own_BC = torch.nn.functional.pad(self._own_BC, (0, more))
        self.num_slots = num_slots

    def _move_together(self) -> None:
        """Bring each row's own slots to the front, in order."""
        counts_B = self._own_BC.sum(1)
        order_BC = torch.argsort((~self._own_BC).to(torch.uint8), dim=1, stable=True)
        for layer in self._cache.layers:
            index = order_BC[:, None, :, None].expand_as(layer.keys).to(layer.keys.device)
            layer.keys = layer.keys.gather(2, index)
            layer.values = layer.values.gather(2, index)
        self._own_BC = torch.arange(self.num_slots)[None] < counts_B[:, None]
        self._cache.rewind(int(counts_B.max()))

    def _keep(self, numbers: Sequence[int]) -> None:
        """Give up all rows but these."""
        kept = torch.tensor(numbers)
        for layer in self._cache.layers:
            on = kept.to(layer.keys.device)
            layer.keys, layer.values = layer.keys[on], layer.values[on]
        self._own_BC, self._last_B = self._own_BC[kept], self._last_B[kept]
        self.rows = [self.rows[number] for number in numbers]


def _slots_for(requests: Sequence[Request]) -> int:
    """Slots for the longest of them, with some to spare."""
    longest = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)
    return longest + longest // 4 + SPARE_SLOTS


def choose(logits_BV: Tensor, settings: SamplingSettings, randoms: Sequence[float]) -> list[int]:
    """A token for each row of logits.

    Args:
        logits_BV: [B, V] float.
        settings: temperature 0 takes the argmax.
        randoms: one number a row, uniform on [0, 1).
    """
    if settings.greedy:
        return cast(list[int], logits_BV.argmax(-1).tolist())
    probs_BK, tokens_BK = candidates(logits_BV, settings)
    sums_BK = probs_BK.double().cumsum(-1)
    points_B1 = torch.tensor(randoms, dtype=torch.float64)[:, None] * sums_BK[:, -1:]
    # The first candidate whose sum exceeds the point; those of no probability never do.
    places_B1 = torch.searchsorted(sums_BK, points_B1, right=True)
    places_B1 = places_B1.clamp(max=probs_BK.shape[-1] - 1)
    return cast(list[int], tokens_BK.gather(-1, places_B1)[:, 0].tolist())


def candidates(logits_BV: Tensor, settings: SamplingSettings) -> tuple[Tensor, Tensor]:
    """What `target_probs` leaves over, likeliest first, without sorting the whole vocabulary.

    Returns:
        probabilities [B, K], not normalized and zero for what is left out, and tokens [B, K].
    """
    probs_BV = (logits_BV.float() / settings.temperature).softmax(-1)
    size = probs_BV.shape[-1]
    limit = min(settings.top_k or size, size)
    if limit == size and settings.top_p >= 1:
        return probs_BV, torch.arange(size).expand_as(probs_BV)
    count = limit if limit < size else min(size, FIRST_CANDIDATES)
    probs_BK, tokens_BK = probs_BV.topk(count, dim=-1)
    total_B1 = probs_BK.sum(-1, keepdim=True) if limit < size else torch.ones(len(probs_BV), 1)
    while count < limit and bool((probs_BK.sum(-1) < settings.top_p).any()):
        count = min(limit, 8 * count)
        probs_BK, tokens_BK = probs_BV.topk(count, dim=-1)
    # A token stays if those before it have not yet reached top_p; the first always stays.
    before_BK = probs_BK.cumsum(-1) - probs_BK
    cut_BK = (before_BK > 0) & (before_BK >= settings.top_p * total_B1)
    return probs_BK.masked_fill(cut_BK, 0), tokens_BK
