"""The target's KV cache of all sequences: one buffer a layer, of which each has a stretch of rows.

What a sequence may need is known when it comes: prompt, most new tokens, and one tree. It gets
exactly that, so memory is bounded by the buffer and nothing is ever moved to make room.

Shapes: G key/value heads, M rows, E head dimension, N new tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from core.decode.cache import check_attention

# Bytes, as torch's own memory has it.
ALIGNMENT = 64


@dataclass(frozen=True)
class Stretch:
    """Rows from `first` on, `size` of them."""

    first: int
    size: int

    @property
    def end(self) -> int:
        """The row behind."""
        return self.first + self.size


class RowSpace:
    """Which rows are free: the first stretch that is long enough is given."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._free = [Stretch(0, num_rows)] if num_rows else []

    @property
    def num_free(self) -> int:
        """Rows that nobody has."""
        return sum(stretch.size for stretch in self._free)

    def take(self, size: int) -> Stretch | None:
        """A stretch of so many rows, if there is one."""
        for place, free in enumerate(self._free):
            if free.size >= size:
                rest = Stretch(free.first + size, free.size - size)
                self._free[place : place + 1] = [rest] if rest.size else []
                return Stretch(free.first, size)
        return None

    def give_back(self, stretch: Stretch) -> None:
        """Free a stretch; neighbours that are free become one with it."""
        merged: list[Stretch] = []
        for free in sorted([*self._free, stretch], key=lambda one: one.first):
            if merged and merged[-1].end == free.first:
                before = merged.pop()
                free = Stretch(before.first, before.size + free.size)
            merged.append(free)
        self._free = merged


def zero_rows(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Rows of a cache, of another tensor's dtype and on its device.

    Zeros, since attention reads rows that nobody has written, and multiplies them by zero. On CPU
    memory is resident only once it is written, which torch's own zeros are at once.
    """
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    size = math.prod(shape) * like.element_size()
    memory = torch.from_numpy(np.zeros(size + ALIGNMENT, np.uint8))
    begin = -memory.data_ptr() % ALIGNMENT
    return memory[begin : begin + size].view(like.dtype).view(shape)


class _Layer(DynamicLayer):
    """Keys and values [1, G, M, E] of one layer."""

    def __init__(self, cache: RowCache) -> None:
        super().__init__()
        self.cache = cache
        self._rows_N: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Reserve the rows."""
        self.dtype, self.device = key_states.dtype, key_states.device
        if key_states.shape == value_states.shape:
            self.reserve_joint(key_states, key_states.shape[1], key_states.shape[-1])
            return
        self.keys, self.values = (
            self._rows(states, states.shape[1], states.shape[-1])[None]
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def reserve_joint(self, like: Tensor, heads: int, size: int) -> None:
        """Reserve keys and values as halves of one buffer [2G, M, E]."""
        self.dtype, self.device = like.dtype, like.device
        self.joint = self._rows(like, 2 * heads, size)
        self.keys, self.values = self.joint[None, :heads], self.joint[None, heads:]
        self.is_initialized = True

    def _rows(self, like: Tensor, heads: int, size: int) -> Tensor:
        return zero_rows(like, (heads, self.cache.num_rows, size))

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new tokens' rows; returns all rows, of which attention knows its own."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows_N = self.cache.writes_N(self.device)
        self.keys.index_copy_(2, rows_N, key_states)
        self.values.index_copy_(2, rows_N, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Of no meaning here: positions are always given."""
        return 0

    def occupy(self) -> None:
        """Write all rows, so that they are resident."""
        for rows in (self.keys, self.values):
            rows.zero_()

    def move(self, source_N: Tensor, target_N: Tensor) -> None:
        """Copy rows onto others; all are read before the first is written."""
        source_N, target_N = source_N.to(self.device), target_N.to(self.device)
        self.keys.index_copy_(2, target_N, self.keys.index_select(2, source_N))
        self.values.index_copy_(2, target_N, self.values.index_select(2, source_N))


class RowCache(Cache):
    """A KV cache of rows, for any HF decoder whose layers all attend fully."""

    def __init__(self, config: PretrainedConfig, num_rows: int, max_context: int) -> None:
        """Reserve the rows.

        Args:
            config: the target's.
            num_rows: M, of all sequences together.
            max_context: most rows of a sequence that see each other.
        Raises:
            InputError: some layer does not attend to all of those.
        """
        check_attention(config, max_context)
        self.num_rows = num_rows
        self._writes: dict[torch.device, Tensor] = {}
        self._writes_N = torch.empty(0, dtype=torch.int64)
        count: int = config.get_text_config().num_hidden_layers
        super().__init__(layers=[_Layer(self) for _ in range(count)])

    @property
    def _slots(self) -> list[_Layer]:
        return cast(list[_Layer], self.layers)

    def joint(self, like: Tensor, heads: int, size: int) -> list[Tensor]:
        """Of each layer the buffer [2G, M, E] of keys and values; reserved like `like`."""
        for layer in self._slots:
            if not layer.is_initialized:
                layer.reserve_joint(like, heads, size)
        return [layer.joint for layer in self._slots]

    @torch.inference_mode()
    def occupy(self) -> None:
        """Have memory behind all rows, which are lost, of layers that have been written to."""
        for layer in self._slots:
            if layer.is_initialized:
                layer.occupy()

    def will_write(self, rows_N: Tensor) -> None:
        """Where the next pass puts its tokens, int64 [N]."""
        self._writes_N, self._writes = rows_N, {}

    def writes_N(self, device: torch.device) -> Tensor:
        """The same on a layer's device."""
        if device not in self._writes:
            self._writes[device] = self._writes_N.to(device)
        return self._writes[device]

    @torch.inference_mode()
    def move(self, source_N: Tensor, target_N: Tensor) -> None:
        """Copy rows onto others, in every layer."""
        for layer in self._slots:
            if layer.is_initialized:
                layer.move(source_N, target_N)
