"""What EAGLE's heads have in common: one decoder layer that reads its own output back.

A head turns true features into a state, reads a state with the token behind it, and gives the
state that stands for the next position. Chains of such steps are drafted in decoding from a cache
(`extend_all`, `step_all`) and, in training and evaluation, from all positions of a batch at once.
Shapes: B batch, T tokens, L feature layers, H hidden, N packed tokens, M of them that chains grow
from, P places of a batch, S supervised ones, I what attention reads, V target vocabulary, W draft
vocabulary, K nodes of one depth, C cached positions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from core.config import DraftConfig
from core.draft.base import (
    DraftBatch,
    DraftBeams,
    DraftCache,
    DraftHead,
    DraftOutput,
    DraftPlace,
    TargetGeometry,
)
from core.draft.layer import ChainKeys, Layer, RotaryEmbedding
from core.draft.packing import Packing
from core.draft.vocabulary import DraftVocabulary
from core.errors import InputError
from core.models.fused_layer import FusedLayer, Heads
from core.models.packed import pack_linears
from core.models.ragged import RaggedBatch, Span

TOP_N = (1, 2, 3, 10)
LOGITS_AT_ONCE = 2**24
"""Logits of the whole vocabulary held at a time: 64 MB of float32."""
# In others' files, but the target's own, which is attached instead.
TARGETS_OWN = ("embed_tokens.weight",)


@dataclass(frozen=True)
class Chains:
    """Chains of drafts in a batch: M of its positions, and what is read along them.

    Position i reads feature i and token i+1; its step k reads token i+1+k and is compared with
    feature i+1+k. So a batch of T tokens has T-1 positions a sequence: places in [B, T-1].

    Attributes:
        packing: the positions that are read at step 0, N: all up to the last chain's.
        rows_M: int64 [M], the chains' own among them.
        next_ids_P: int64, the token behind each of the B · (T-1) places.
        supervised_P: bool, whether step k of chain i counts, at place i+k.
        final_PH: the final feature that each place predicts; any dtype.
    """

    packing: Packing
    rows_M: Tensor
    next_ids_P: Tensor
    supervised_P: Tensor
    final_PH: Tensor

    @classmethod
    def of(cls, batch: DraftBatch, supervised_BT: Tensor, wanted_BT: Tensor) -> Chains:
        """Chains from the wanted positions, bool [B, T-1]."""
        # What stands behind a sequence's last chain is seen by none.
        packing = Packing.of(wanted_BT.flip(1).cumsum(1).flip(1) > 0)
        return cls(
            packing=packing,
            rows_M=packing.pack(wanted_BT).nonzero()[:, 0],
            next_ids_P=batch.input_ids_BT[:, 1:].flatten(),
            supervised_P=supervised_BT.flatten(),
            final_PH=batch.features_BTLH[:, 1:, -1].flatten(0, 1),
        )

    def places_M(self, step: int) -> Tensor:
        """int64 [M], where the chains are at a step; some valid place once they are at an end."""
        places_M = self.packing.places_N.index_select(0, self.rows_M)
        return (places_M + step).clamp(max=max(0, len(self.next_ids_P) - 1))

    @cached_property
    def final_SH(self) -> Tensor:
        """The final features of the S supervised places."""
        return self.final_PH[self.supervised_P]

    def targets_M(self, step: int) -> Tensor:
        """int64 [M], which of the S each chain is at; without meaning where it is at none."""
        return (self.supervised_P.cumsum(0) - 1)[self.places_M(step)]

    def counted_M(self, step: int) -> Tensor:
        """bool [M], which chains are at a supervised place of their own sequence at a step."""
        columns_M = self.packing.positions_N.index_select(0, self.rows_M) + step
        return self.supervised_P[self.places_M(step)] & (columns_M < self.packing.shape[1])


def supervised_positions(batch: DraftBatch) -> Tensor:
    """bool [B, T-1]: where the mask says so and the token behind is one, not padding."""
    columns = torch.arange(batch.input_ids_BT.shape[1], device=batch.input_ids_BT.device)
    is_token_BT = columns[None, :] < batch.lengths_B[:, None]
    return batch.loss_mask_BT[:, :-1] & is_token_BT[:, 1:]


def shifted(x_BT: Tensor, step: int) -> Tensor:
    """bool [B, T] moved `step` to the left, false where there is nothing."""
    return F.pad(x_BT[:, step:], (0, min(step, x_BT.shape[1])), value=False)


def starts(supervised_BT: Tensor, num_steps: int) -> Tensor:
    """bool [B, T-1]: positions from which a chain of so many steps comes to a supervised one."""
    wanted_BT = supervised_BT
    for step in range(1, num_steps):
        wanted_BT = wanted_BT | shifted(supervised_BT, step)
    return wanted_BT


class RecurrentHead(DraftHead):
    """A head of one decoder layer; algorithms say what it reads and how it guesses."""

    def __init__(
        self, config: DraftConfig, geometry: TargetGeometry, vocabulary: DraftVocabulary
    ) -> None:
        super().__init__(config, geometry, vocabulary)
        self.rotary = RotaryEmbedding(geometry.head_dim, geometry.rope_theta)
        self.embedding_VH: Tensor | None = None
        self._output_head_VH: Tensor | None = None
        # The layer in few operators, where its weights are packed.
        self.fused: FusedLayer | None = None
        self._heads = Heads(
            geometry.num_attention_heads, geometry.num_key_value_heads, geometry.head_dim
        )

    # What an algorithm defines

    @property
    @abstractmethod
    def layer(self) -> Layer:
        """The decoder layer."""

    @abstractmethod
    def first_state(self, features_LH: Tensor) -> Tensor:
        """What true features [..., L, H] stand for: a state [..., H]."""

    @abstractmethod
    def layer_input(self, state: Tensor, next_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Of states and the tokens behind: what attention reads [..., I], residual [..., H]."""

    @abstractmethod
    def logits(self, state: Tensor) -> Tensor:
        """Guesses [..., W] from states [..., H]."""

    # The target's tensors

    def attach_target(self, embedding_VH: Tensor, output_head_VH: Tensor) -> None:
        """See base class."""
        like = next(self.parameters())
        self.embedding_VH = embedding_VH.to(device=like.device, dtype=like.dtype)
        self._output_head_VH = output_head_VH.to(device=like.device, dtype=like.dtype)

    def embed(self, ids: Tensor) -> Tensor:
        """The target's embedding [..., H] of tokens."""
        assert self.embedding_VH is not None, "attach_target comes first"
        return F.embedding(ids, self.embedding_VH)

    def output_rows(self) -> Tensor:
        """The draft vocabulary's rows [W, H] of the target's output head."""
        assert self._output_head_VH is not None, "attach_target comes first"
        return self.vocabulary.rows(self._output_head_VH)

    def prepare_for_inference(self, *, packed: bool) -> None:
        """See base class; the target's whole output head is let go."""
        self.eval().requires_grad_(False)
        if packed:
            pack_linears(self)
            layer = self.layer
            self.fused = FusedLayer.of(
                layer.self_attn, layer.mlp, layer.post_attention_layernorm, self._heads
            )
        self._output_head_VH = None

    @torch.no_grad()
    def target_choices(self, final_SH: Tensor) -> tuple[Tensor, Tensor]:
        """What the target itself says at places, of their final features [S, H].

        Returns:
            Its logits of the draft vocabulary [S, W] in the head's dtype, and the draft id [S] of
            its argmax over its whole vocabulary, -1 where that is outside of the draft's.
        """
        assert self._output_head_VH is not None, "attach_target comes first"
        size, d2t_W = self.vocabulary.target_size, self.vocabulary.d2t_W.to(final_SH.device)
        head_VH = self._output_head_VH[:size]
        t2d_V = self.vocabulary.t2d_V.to(final_SH.device)
        logits, best = [], []
        for part_SH in final_SH.to(head_VH.dtype).split(max(1, LOGITS_AT_ONCE // size)):
            logits_SV = part_SH @ head_VH.T
            best.append(t2d_V[logits_SV.argmax(-1)])
            logits.append(logits_SV if self.vocabulary.is_whole else logits_SV[:, d2t_W])
        return torch.cat(logits), torch.cat(best)

    # Training and evaluation

    def grow(self, batch: DraftBatch, chains: Chains, num_steps: int) -> Iterator[Tensor]:
        """The chains' states [M, H] after each step, teacher-forced along the text.

        Step 0 reads true features (with the batch's noise) and attends causally; step k reads
        the state that step k-1 gave, at the position behind it, and attends to what step 0 saw
        and to the chain's own steps.
        """
        packing, rows_M = chains.packing, chains.rows_M
        features_NLH = packing.pack(batch.features_BTLH[:, :-1])
        if batch.noise_BTLH is not None:
            features_NLH = features_NLH + packing.pack(batch.noise_BTLH[:, :-1])
        features_NLH = features_NLH.to(next(self.parameters()).dtype)
        device = features_NLH.device
        cos_TE, sin_TE = self.rotary(torch.arange(packing.shape[1] + num_steps, device=device))
        positions_N = packing.positions_N
        state_MH, keys = self.recomputed(
            self._first_step,
            features_NLH,
            packing.pack(batch.input_ids_BT[:, 1:]),
            chains,
            cos_TE[positions_N],
            sin_TE[positions_N],
        )
        yield state_MH
        positions_M = positions_N.index_select(0, rows_M)
        for step in range(1, num_steps):
            state_MH, keys = self.recomputed(
                self._later_step,
                state_MH,
                chains.next_ids_P[chains.places_M(step)],
                keys,
                cos_TE[positions_M + step],
                sin_TE[positions_M + step],
            )
            yield state_MH

    def _first_step(
        self,
        features_NLH: Tensor,
        next_ids_N: Tensor,
        chains: Chains,
        cos_NE: Tensor,
        sin_NE: Tensor,
    ) -> tuple[Tensor, ChainKeys]:
        x_NI, residual_NH = self.layer_input(self.first_state(features_NLH), next_ids_N)
        attention_MH, keys = self.layer.self_attn.packed(
            x_NI, chains.packing, chains.rows_M, cos_NE, sin_NE
        )
        residual_MH = residual_NH.index_select(0, chains.rows_M)
        return self.layer.after_attention(residual_MH, attention_MH), keys

    def _later_step(
        self,
        state_MH: Tensor,
        next_ids_M: Tensor,
        keys: ChainKeys,
        cos_ME: Tensor,
        sin_ME: Tensor,
    ) -> tuple[Tensor, ChainKeys]:
        x_MI, residual_MH = self.layer_input(state_MH, next_ids_M)
        attention_MH, keys = self.layer.self_attn.unrolled(x_MI, keys, cos_ME, sin_ME)
        return self.layer.after_attention(residual_MH, attention_MH), keys

    @torch.no_grad()
    def chain_hits(self, batch: DraftBatch, depth: int) -> tuple[Tensor, Tensor]:
        """See base class."""
        supervised_BT = supervised_positions(batch)
        batch, whole_BT = replace(batch, noise_BTLH=None), supervised_BT
        for step in range(1, depth):
            whole_BT = whole_BT & shifted(supervised_BT, step)
        chains = Chains.of(batch, supervised_BT, whole_BT)
        _, best_S = self.target_choices(chains.final_SH)
        alive_M = torch.ones_like(chains.rows_M, dtype=torch.bool)
        hits = []
        for step, state_MH in enumerate(self.grow(batch, chains, depth)):
            guess_M = self.logits(state_MH).argmax(-1)
            alive_M = alive_M & (guess_M == best_S[chains.targets_M(step)])
            hits.append(alive_M.sum())
        return torch.stack(hits), torch.tensor(len(alive_M), device=alive_M.device)

    # Decoding

    def new_cache(self, max_tokens: int) -> DraftCache:
        """See base class."""
        assert self.embedding_VH is not None, "attach_target comes first"
        shape = (2 * self._heads.keys, max_tokens, self._heads.size)
        return DraftCache(self.embedding_VH.new_zeros(shape))

    def extend_all(
        self,
        cache: DraftCache,
        places: Sequence[DraftPlace],
        counts: Sequence[int],
        features_NLH: Tensor,
        next_ids_N: Tensor,
    ) -> DraftOutput:
        """See base class."""
        # The embedding's dtype is the head's; packed layers do not tell theirs.
        state_NH = self.first_state(features_NLH.to(self.embed(next_ids_N[:1]).dtype))
        firsts = torch.tensor([place.first for place in places])
        done = torch.tensor([place.committed for place in places])
        new = torch.tensor(counts)
        ends = new.cumsum(0)
        # Of each new position, how far behind its sequence's first row it goes.
        positions_N = torch.arange(len(next_ids_N)) + (done - ends + new).repeat_interleave(new)
        spans = [
            Span(place.first, place.committed + count - 1, 1)
            for place, count in zip(places, counts, strict=True)
        ]
        state_SH = self._read(
            cache,
            (state_NH, next_ids_N),
            positions_N,
            positions_N + firsts.repeat_interleave(new),
            spans,
            None if len(next_ids_N) == len(places) else ends - 1,
        )
        return DraftOutput(state_SH, self.logits(state_SH))

    def step_all(self, cache: DraftCache, beams: DraftBeams) -> DraftOutput:
        """See base class."""
        width = beams.token_ids_SK.shape[1]
        rows = beams.sees_SKT.shape[2]
        done = torch.tensor([place.committed for place in beams.places])
        begins = torch.tensor([place.first + place.committed for place in beams.places])
        own_K = torch.arange(rows - width, rows)
        spans = [
            Span(place.first, place.committed, width, sees_KT)
            for place, sees_KT in zip(beams.places, beams.sees_SKT, strict=True)
        ]
        state_NH = self._read(
            cache,
            (beams.hidden_SKH.flatten(0, 1), beams.token_ids_SK.flatten()),
            (done + beams.depth - 1).repeat_interleave(width),
            (begins[:, None] + own_K).flatten(),
            spans,
            None,
        )
        return DraftOutput(state_NH, self.logits(state_NH))

    def _read(
        self,
        cache: DraftCache,
        read: tuple[Tensor, Tensor],
        positions_N: Tensor,
        rows_N: Tensor,
        spans: Sequence[Span],
        asking_K: Tensor | None,
    ) -> Tensor:
        """States after N positions that the cache takes in; of K of them where not all are asked.

        `read` are states and the tokens behind them.
        """
        x_NI, residual_NH = self.layer_input(*read)
        device = x_NI.device
        rows_N = rows_N.to(device)
        asking_K = None if asking_K is None else asking_K.to(device)
        ragged = RaggedBatch(tuple(spans))
        if self.fused is not None:
            turn = self._heads.rotation(*self.rotary.looked_up(positions_N, x_NI.dtype))
            return self.fused(x_NI, residual_NH, turn, cache.joint, rows_N, ragged, asking_K)
        cos, sin = self.rotary(positions_N.to(device))
        attention_KH = self.layer.self_attn.cached(x_NI, cos, sin, cache, rows_N, ragged, asking_K)
        if asking_K is not None:
            residual_NH = residual_NH[asking_K]
        return self.layer.after_attention(residual_NH, attention_KH)

    # Public layout

    def eagle_tensors(self) -> dict[str, Tensor]:
        """See base class."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    def load_eagle_tensors(self, tensors: dict[str, Tensor]) -> None:
        """See base class. An embedding in the file is passed over: it is the target's."""
        given = {name: t for name, t in tensors.items() if name not in TARGETS_OWN}
        own = self.state_dict()
        wrong = [
            f"{name} {list(given[name].shape)} instead of {list(own[name].shape)}"
            for name in own.keys() & given.keys()
            if given[name].shape != own[name].shape
        ]
        problems = {
            "missing": sorted(own.keys() - given.keys()),
            "unknown": sorted(given.keys() - own.keys()),
            "of another shape": wrong,
        }
        said = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items() if names)
        if said:
            raise InputError(
                f"these are not the weights of this {self.config.kind} head: {said}; its "
                "config.json is of another checkpoint, or the file is damaged"
            )
        self.load_state_dict(given)
