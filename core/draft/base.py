"""What every draft algorithm offers to training and to decoding.

Shapes: B batch, T tokens, L feature layers, H hidden, V target vocabulary, W draft vocabulary,
K nodes drafted in one forward pass, S sequences, N new positions of all of them, M cache rows,
G key/value heads, E head dimension.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from core.config import DraftConfig
from core.draft.vocabulary import DraftVocabulary

FEED_FORWARD_NAMES = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
EPSILON_NAMES = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")


@dataclass(frozen=True)
class TargetGeometry:
    """What a draft head must share with its target."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> TargetGeometry:
        """Read an HF config; names differ where a model is no Llama.

        A mixture's feed-forward size is one expert's (Mixtral) or what dense layers beside the
        experts have (Qwen-3): the head's one layer is dense.
        """
        text: Any = config.get_text_config()
        # transformers 5 keeps rotary settings there, per kind of layer where kinds differ.
        rope = getattr(text, "rope_parameters", None) or {}
        rope = rope.get("full_attention", rope)
        heads, hidden = text.num_attention_heads, text.hidden_size
        given = (getattr(text, name, None) for name in FEED_FORWARD_NAMES)
        epsilons = (getattr(text, name, None) for name in EPSILON_NAMES)
        return cls(
            vocab_size=text.vocab_size,
            hidden_size=hidden,
            intermediate_size=next((size for size in given if size), 4 * hidden),
            num_attention_heads=heads,
            num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or hidden // heads,
            rms_norm_eps=next((epsilon for epsilon in epsilons if epsilon), 1e-6),
            rope_theta=rope.get("rope_theta", getattr(text, "rope_theta", None) or 10000.0),
            max_position_embeddings=text.max_position_embeddings,
        )


@dataclass
class DraftBatch:
    """A right-padded batch of training sequences.

    Attributes:
        input_ids_BT: int64 [B, T].
        features_BTLH: [B, T, L, H] target features of the same tokens, the final feature last.
        loss_mask_BT: bool [B, T], true where the assistant speaks, false on padding.
        lengths_B: int64 [B], tokens of each sequence, padding not counted.
        noise_BTLH: added to the features the head reads, never to the ones it must predict;
            None for none.
    """

    input_ids_BT: Tensor
    features_BTLH: Tensor
    loss_mask_BT: Tensor
    lengths_B: Tensor
    noise_BTLH: Tensor | None = None


@dataclass
class LossSums:
    """Sums over the supervised tokens of a batch, so that callers can normalize globally.

    Attributes:
        loss: differentiable scalar, the sum of the tokens' losses.
        num_tokens: int64 scalar, supervised tokens.
        sums: detached scalars to be divided by `num_tokens`: parts of the loss, and hits of
            the target's argmax among the head's top n (`top1`, `top2`, `top3`, `top10`).
    """

    loss: Tensor
    num_tokens: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class DraftCache:
    """Keys and values of a head with one decoder layer: M rows, preallocated.

    Many sequences may share it, each with a stretch of its own; a sequence alone begins at row 0
    and has read `committed` positions.

    Attributes:
        joint: both in one buffer [2G, M, E], keys first.
    """

    joint: Tensor
    committed: int = 0

    @property
    def keys(self) -> Tensor:
        """[G, M, E], a view."""
        return self.joint[: len(self.joint) // 2]

    @property
    def values(self) -> Tensor:
        """[G, M, E], a view."""
        return self.joint[len(self.joint) // 2 :]

    @property
    def max_tokens(self) -> int:
        """Rows that it has room for."""
        return self.joint.shape[1]


@dataclass(frozen=True)
class DraftPlace:
    """Where a sequence stands in a head's cache.

    Attributes:
        first: row where it begins.
        committed: positions that were read with true features; the rows behind belong to the
            present round's tree, and are written over by the next read.
    """

    first: int
    committed: int


class DraftHead(nn.Module, ABC):
    """A draft head. The target's embedding and output head are attached, never saved.

    Attributes:
        own_embedding_VH: [V, H], an embedding that came with the head and is attached in place of
            the target's; None for the target's. Heads that train_draft makes have none.
        aux_layers: of a head that reads more than the final feature: the layers whose entering
            states it reads, ascending; None for the algorithm's usual ones.
        recomputes: whether training computes activations again in the backward pass.
        fixed_vocabulary: whether weights of its own stand for the draft vocabulary's tokens;
            otherwise it guesses with the target's output head, and may be given further tokens.
    """

    fixed_vocabulary: ClassVar[bool] = True
    own_embedding_VH: Tensor | None = None
    aux_layers: tuple[int, ...] | None = None
    recomputes = False

    def __init__(
        self, config: DraftConfig, geometry: TargetGeometry, vocabulary: DraftVocabulary
    ) -> None:
        super().__init__()
        self.config = config
        self.geometry = geometry
        self.vocabulary = vocabulary

    @abstractmethod
    def attach_target(self, embedding_VH: Tensor, output_head_VH: Tensor) -> None:
        """Give the head the target's frozen embedding and output head, [V, H] each."""

    def start_from(self, output_head_VH: Tensor) -> None:
        """Before training's first step: take over what the target's output head [V, H] knows.

        Heads that read the target's own output head have nothing to take.
        """

    def feature_layers(self, num_layers: int) -> tuple[int, ...]:
        """What `extend` wants of a target of so many layers, as in a feature manifest.

        Raises:
            ConfigError: the target does not have these layers.
        """
        return (num_layers,)

    @abstractmethod
    def losses(self, batch: DraftBatch) -> LossSums:
        """Training loss and metrics, summed over supervised tokens."""

    def recomputed(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """`function(*inputs)`; where the head `recomputes`, its activations are not kept."""
        if self.recomputes and self.training and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)

    @abstractmethod
    def chain_hits(self, batch: DraftBatch, depth: int) -> tuple[Tensor, Tensor]:
        """How long a chain of drafts, grown along the text, stays what the target would choose.

        At each position the head drafts `depth` tokens: it reads the true feature and token
        there, then its own predicted states and the text's true tokens. A chain of d tokens is a
        hit where each of the d is the target's argmax over its whole vocabulary at its place.
        Positions are those whose next `depth` places are all supervised: behind the end of an
        answer nothing is drafted.

        1 + sum of hits / positions estimates the accepted length of drafting one chain of
        `depth` tokens at temperature 0. It is that length, for rounds that begin at every
        position, where the text is the target's own greedy one. On another text the tokens fed
        are not the ones drafted and the estimate is of drafting along that text; and rounds of
        real decoding begin where the round before ended, more often at hard places. A tree
        accepts more.

        Args:
            batch: noise is left aside.
            depth: D, tokens a chain.
        Returns:
            hits_D int64 [D], and positions, an int64 scalar.
        """

    @abstractmethod
    def new_cache(self, max_tokens: int) -> DraftCache:
        """An empty cache for sequences of up to `max_tokens` (tree included)."""

    @abstractmethod
    def extend_all(
        self,
        cache: DraftCache,
        places: Sequence[DraftPlace],
        counts: Sequence[int],
        features_NLH: Tensor,
        next_ids_N: Tensor,
    ) -> DraftOutput:
        """Read further committed positions of several sequences, with their true features.

        Args:
            cache: takes the positions in, over what earlier trees left there.
            places: where the S sequences stand before.
            counts: new positions of each, at least 1; N in all, in this order.
            features_NLH: laid out as in a training batch, the final feature last.
            next_ids_N: the tokens behind.
        Returns:
            Hidden state and logits of each sequence's last position alone: S rows.
        """

    @abstractmethod
    def step_all(self, cache: DraftCache, beams: DraftBeams) -> DraftOutput:
        """Read tree nodes of one depth, features predicted by the head itself; S · K rows out."""

    def extend(self, cache: DraftCache, features_TLH: Tensor, next_ids_T: Tensor) -> DraftOutput:
        """`extend_all` of the one sequence of a cache; one row out."""
        place, count = DraftPlace(0, cache.committed), len(next_ids_T)
        output = self.extend_all(cache, [place], [count], features_TLH, next_ids_T)
        cache.committed += count
        return output

    def step(self, cache: DraftCache, nodes: DraftNodes) -> DraftOutput:
        """`step_all` of the one sequence of a cache; K rows out."""
        beams = DraftBeams(
            places=(DraftPlace(0, cache.committed),),
            hidden_SKH=nodes.hidden_KH[None],
            token_ids_SK=nodes.token_ids_K[None],
            depth=nodes.depth,
            sees_SKT=nodes.sees_KT[None],
        )
        return self.step_all(cache, beams)

    @abstractmethod
    def eagle_tensors(self) -> dict[str, Tensor]:
        """Weights by their names in the public EAGLE layout."""

    @abstractmethod
    def load_eagle_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take weights by their names in the public EAGLE layout.

        Raises:
            InputError: a tensor is missing, unknown or of the wrong shape.
        """

    @classmethod
    def settings_of(
        cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """The config fields of a head of others' making with these weights.

        Args:
            tensors: by their names in the public EAGLE layout, without an embedding.
            config: the flat `config.json` that came with them.
        Returns:
            What differs from the config class's defaults; None where these are the weights of
            another algorithm. An algorithm that only Aerie has need not look.
        """
        return None

    def prepare_for_inference(self, *, packed: bool) -> None:
        """Make decoding fast: freeze, and pack linear layers where that is asked for."""


@dataclass(frozen=True)
class DraftOutput:
    """Result of reading K positions: hidden states [K, H] fed back, and logits [K, W]."""

    hidden_KH: Tensor
    logits_KW: Tensor


@dataclass(frozen=True)
class DraftNodes:
    """K tree nodes of one depth.

    Attributes:
        hidden_KH: the parents' hidden states.
        token_ids_K: the nodes' tokens, target ids.
        depth: nodes between them and the last committed token; 1 for the root's children.
        sees_KT: bool [K, tree rows in the cache + K], which rows of this round's tree each node
            may attend to: its ancestors and itself. Committed rows are always visible.
    """

    hidden_KH: Tensor
    token_ids_K: Tensor
    depth: int
    sees_KT: Tensor


@dataclass(frozen=True)
class DraftBeams:
    """K tree nodes of one depth for each of S sequences.

    Attributes:
        places: where the sequences stand.
        hidden_SKH: the parents' hidden states.
        token_ids_SK: the nodes' tokens, target ids.
        depth: as of `DraftNodes`.
        sees_SKT: as of `DraftNodes`.
    """

    places: tuple[DraftPlace, ...]
    hidden_SKH: Tensor
    token_ids_SK: Tensor
    depth: int
    sees_SKT: Tensor


def build_head(
    config: DraftConfig, geometry: TargetGeometry, vocabulary: DraftVocabulary, seed: int = 0
) -> DraftHead:
    """A new head with random weights that depend on `seed` alone."""
    cls = implementation(type(config))
    geometry = geometry_of(config, geometry)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(config, geometry, vocabulary)


def geometry_of(config: DraftConfig, target: TargetGeometry) -> TargetGeometry:
    """A head's geometry: its target's, but for what the config says otherwise."""
    if config.intermediate_size:
        return replace(target, intermediate_size=config.intermediate_size)
    return target


def implementation(config: type[DraftConfig]) -> type[DraftHead]:
    """The head's class that a config class names."""
    module, _, name = config.implementation.partition(":")
    cls: type[DraftHead] = getattr(importlib.import_module(module), name)
    return cls
