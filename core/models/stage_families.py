"""Where the parts of an architecture are, and how its layers are called one by one.

A pipeline calls an HF model's own modules without the model's forward pass round them, so it has
to give each layer what that pass would have: rotary angles, a mask, a bias by distance. All of it
is asked of transformers' functions and the model's own modules, and follows from the positions
alone. They begin anew with each sequence of a row, by which transformers tells packed sequences
apart. Padding stands at the right, where no token sees it.

To add an architecture: a class here, or its `model_type` in the list of one that fits, and its
line in `tests/tiny_models.py`. Shapes: B rows, T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from core.errors import ConfigError

Shared = TypeVar("Shared")
FULL, SLIDING = "full_attention", "sliding_attention"


class StageFamily:
    """The parts of a model of some architectures; `body` is what HF calls the base model.

    Attributes:
        model_types: `model_type` of the configs that it is for.
        layers: name of the list of decoder layers in the body.
        embedding: of the token embedding in the body.
        entry: of what else stands before the first layer.
        norm: of the final norm.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    layers: ClassVar[str] = "layers"
    embedding: ClassVar[str] = "embed_tokens"
    entry: ClassVar[tuple[str, ...]] = ()
    norm: ClassVar[str] = "norm"

    def __init__(self, body: PreTrainedModel) -> None:
        """Of a model whose weights may be on the meta device yet."""
        self.body: Any = body
        self.config: PretrainedConfig = body.config
        # What all layers of a pass share, for as long as its positions are there.
        self._shared = WeakTensorKeyDictionary()

    def enter(self, embedded_BTH: Tensor, positions_BT: Tensor) -> Tensor:
        """From the tokens' embeddings to what enters the first layer; calls `entry` alone."""
        return embedded_BTH

    def arguments(self, index: int, hidden_BTH: Tensor, positions_BT: Tensor) -> dict[str, Any]:
        """What a layer is called with, besides its input."""
        return {"attention_mask": self._mask(FULL, hidden_BTH, positions_BT)}

    def ready(self, device: torch.device) -> None:
        """Make what the layers share and no checkpoint holds."""

    def _mask(self, kind: str, hidden_BTH: Tensor, positions_BT: Tensor) -> Any:
        """As the attention in use wants it; None where it is causal by itself."""
        make = create_sliding_window_causal_mask if kind == SLIDING else create_causal_mask
        return self._once(
            kind,
            positions_BT,
            lambda: make(
                config=self.config,
                inputs_embeds=hidden_BTH,
                attention_mask=None,
                past_key_values=None,
                position_ids=positions_BT,
            ),
        )

    def _once(self, name: str, positions_BT: Tensor, make: Callable[[], Shared]) -> Shared:
        found: dict[str, Any] = self._shared.setdefault(positions_BT, {})
        if name not in found:
            with torch.no_grad():
                found[name] = make()
        value: Shared = found[name]
        return value


class RotaryFamily(StageFamily):
    """Llama and what is built like it."""

    model_types = ("llama", "mistral", "mixtral", "qwen2", "qwen3")

    def ready(self, device: torch.device) -> None:
        """The angles' frequencies are computed from the config, not loaded."""
        rotary = type(self.body.rotary_emb)
        self.body.rotary_emb = rotary(config=self.config).to(device)

    def arguments(self, index: int, hidden_BTH: Tensor, positions_BT: Tensor) -> dict[str, Any]:
        """Rotary angles and mask; some layers may see a window only."""
        types = getattr(self.config, "layer_types", None)
        window = getattr(self.config, "sliding_window", None)
        kind = types[index] if types else (FULL if window is None else SLIDING)
        return {
            "attention_mask": self._mask(kind, hidden_BTH, positions_BT),
            "position_ids": positions_BT,
            "position_embeddings": self._once(
                "rotary", positions_BT, lambda: self.body.rotary_emb(hidden_BTH, positions_BT)
            ),
        }


class BloomFamily(StageFamily):
    """Bloom: no position embedding, but a bias on each key that grows with its position."""

    model_types = ("bloom",)
    layers, embedding, norm = "h", "word_embeddings", "ln_f"
    entry = ("word_embeddings_layernorm",)

    def enter(self, embedded_BTH: Tensor, positions_BT: Tensor) -> Tensor:
        """A norm."""
        normed_BTH: Tensor = self.body.word_embeddings_layernorm(embedded_BTH)
        return normed_BTH

    def arguments(self, index: int, hidden_BTH: Tensor, positions_BT: Tensor) -> dict[str, Any]:
        """Mask and bias (ALiBi), which HF reads off a mask of padding: here off the positions."""
        return super().arguments(index, hidden_BTH, positions_BT) | {
            "alibi": self._once(
                "alibi", positions_BT, lambda: self._alibi(hidden_BTH, positions_BT)
            )
        }

    def _alibi(self, hidden_BTH: Tensor, positions_BT: Tensor) -> Tensor:
        """[B · heads, 1, T]: position times the head's slope, the bias of position 1."""
        two = torch.ones(1, 2, dtype=torch.long, device=hidden_BTH.device)
        bias_N12 = self.body.build_alibi_tensor(two, self.body.num_heads, torch.float32)
        alibi_BNT = bias_N12[None, :, 0, 1:] * positions_BT[:, None]
        return alibi_BNT.flatten(0, 1)[:, None].to(hidden_BTH.dtype)


class GPT2Family(StageFamily):
    """GPT-2: learned positions."""

    model_types = ("gpt2",)
    layers, embedding, norm = "h", "wte", "ln_f"
    entry = ("wpe", "drop")

    def enter(self, embedded_BTH: Tensor, positions_BT: Tensor) -> Tensor:
        """Adds the positions' embeddings."""
        entered_BTH: Tensor = self.body.drop(embedded_BTH + self.body.wpe(positions_BT))
        return entered_BTH


FAMILIES: tuple[type[StageFamily], ...] = (RotaryFamily, BloomFamily, GPT2Family)


def family_of(config: PretrainedConfig) -> type[StageFamily]:
    """The family of an architecture.

    Raises:
        ConfigError: none, or the model's loss has a part that a pipeline does not compute.
    """
    for family in FAMILIES:
        if config.model_type in family.model_types:
            if getattr(config, "output_router_logits", False):
                raise ConfigError(
                    "the target's config.json sets output_router_logits, which adds a loss of the "
                    "routers that a pipeline does not compute; set it to false, or "
                    "train.parallelism to one that is no pipeline"
                )
            return family
    known = sorted(name for family in FAMILIES for name in family.model_types)
    raise ConfigError(
        f"the target's architecture is {config.model_type}; pipelines know {', '.join(known)}; "
        "set train.parallelism to one that is no pipeline"
    )


def output_of(result: Any) -> Tensor:
    """The hidden states among what a layer returns, which is a tuple in some architectures."""
    hidden: Tensor = result[0] if isinstance(result, tuple) else result
    return hidden


def final_norm(family: StageFamily) -> nn.Module:
    """The norm before the head."""
    norm: nn.Module = getattr(family.body, family.norm)
    return norm
