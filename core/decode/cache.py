"""The target's KV cache: preallocated, written in place, committed by gathering the kept rows.

Shapes: G key/value heads, C cached positions, E head dimension, P nodes of the accepted path.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from core.errors import InputError


class _Layer(DynamicLayer):
    """Keys and values [1, G, max_tokens, E] of one layer; `length` rows are in use."""

    def __init__(self, max_tokens: int) -> None:
        super().__init__()
        self.max_tokens, self.length = max_tokens, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Reserve the rows; memory that is never written is never resident."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, size = key_states.shape
        self.keys = key_states.new_empty((batch, heads, self.max_tokens, size))
        self.values = value_states.new_empty((batch, heads, self.max_tokens, size))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append rows; returns views of all rows in use."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Rows in use."""
        return self.length


class SequenceCache(Cache):
    """The KV cache of one sequence, for any HF decoder whose layers all attend fully."""

    def __init__(self, config: PretrainedConfig, max_tokens: int) -> None:
        """Reserve `max_tokens` rows a layer: prompt, output and one tree.

        Raises:
            InputError: some layer does not attend to all of those rows.
        """
        check_attention(config, max_tokens)
        count: int = config.get_text_config().num_hidden_layers
        super().__init__(layers=[_Layer(max_tokens) for _ in range(count)])
        self.max_tokens = max_tokens

    @property
    def length(self) -> int:
        """Rows in use."""
        return self._slots[0].length

    @property
    def _slots(self) -> list[_Layer]:
        return self.layers

    def rewind(self, length: int) -> None:
        """Forget all rows from `length` on."""
        for layer in self._slots:
            layer.length = length

    @torch.inference_mode()
    def commit(self, start: int, path: tuple[int, ...]) -> None:
        """Of the tree rows that begin at `start`, keep those of the accepted path, in order."""
        end = start + len(path)
        # A path along the first nodes is in place already.
        if path != tuple(range(len(path))):
            rows = torch.tensor(path, device=self._slots[0].keys.device) + start
            for layer in self._slots:
                layer.keys[:, :, start:end] = layer.keys[:, :, rows]
                layer.values[:, :, start:end] = layer.values[:, :, rows]
        self.rewind(end)


def check_attention(config: PretrainedConfig, max_tokens: int) -> None:
    """Refuse what a tree's mask would silently change: windows and layers without attention."""
    text: Any = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    window = getattr(text, "sliding_window", None)
    foreign = kinds - {"full_attention", "sliding_attention"}
    if foreign:
        raise InputError(
            f"target.path: {text.model_type} has layers of {', '.join(sorted(foreign))}, which "
            "cannot verify a draft tree; use a target whose layers all have full attention"
        )
    slides = "sliding_attention" in kinds or not kinds
    if slides and window is not None and window < max_tokens:
        raise InputError(
            f"target.path: {text.model_type} attends through a window of {window} tokens, less "
            f"than decode.max_context={max_tokens}; lower decode.max_context to {window}"
        )
