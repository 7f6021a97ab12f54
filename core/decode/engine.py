"""The speculative decoder for one sequence at a time.

A round has four phases: draft a tree from the target's features, verify it in one target pass,
commit the accepted path, and let the head read the newly committed tokens. Decoding without
speculation is the same loop with a tree of the root alone.

Shapes: T tokens, N tree nodes, H hidden, V vocabulary, C cached positions, L feature layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from core.config import DecodeConfig
from core.decode.cache import SequenceCache
from core.decode.ngram import NgramIndex, merge
from core.decode.sampler import Sampler, TokenLogprobs
from core.decode.sampling import SamplingSettings
from core.decode.tree import PLAIN, DraftTree, TreePlan, draft_tree
from core.decode.verify import Verification
from core.draft.base import DraftCache, DraftHead, DraftOutput
from core.errors import ConfigError, InputError
from core.models.target import Target


@dataclass(frozen=True)
class Round:
    """What one target pass committed.

    Attributes:
        tokens: committed tokens, at least one.
        drafted: for each, whether it had been guessed, by the draft head or by copying.
        tree_size: nodes verified; 0 for the prompt's pass (prefill), which drafts nothing.
        ranks: reranking places of the accepted nodes (for the tree policy), uncut.
        logprobs: one for each token where the request's settings ask for them, else none.
    """

    tokens: tuple[int, ...]
    drafted: tuple[bool, ...]
    tree_size: int
    ranks: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()


class SpeculativeDecoder:
    """Decodes one sequence at a time; not thread-safe.

    Guarantee: at temperature 0 the tokens of target-only decoding, as long as floating-point
    rounding leaves the target's argmax alone; above it, samples of the same distribution.
    """

    def __init__(self, target: Target, head: DraftHead | None, config: DecodeConfig) -> None:
        """Get ready to decode.

        Args:
            target: loaded by `load_target`.
            head: with the target attached and prepared for inference; None for plain decoding.
            config: tree, sampling defaults, context length.
        Raises:
            ConfigError: the head reads layers that the target does not have.
        """
        target.check_output_head()
        self.target, self.head, self.config = target, head, config
        self.max_context = min(config.max_context, target.max_position)
        # Decoding plainly computes no features but the final one.
        self.feature_layers = () if head is None else head.feature_layers(target.num_layers)
        self._cache = SequenceCache(target.model.config, self.max_context)
        self._draft_cache: DraftCache | None = None
        self.plan = PLAIN
        if config.total_tokens != "auto":
            self.plan = self.plan_of(config.total_tokens)

    def plan_of(self, total_tokens: int) -> TreePlan:
        """A fixed tree size with the configured depth and top-k."""
        if total_tokens == 1:
            return PLAIN
        if self.head is None and not self.config.ngram_match:
            raise ConfigError(
                f"decode.total_tokens={total_tokens} needs a draft head; set draft.path, or "
                "decode.ngram_match to draft by copying alone"
            )
        return TreePlan(total_tokens, self.config.depth, self.config.top_k)

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float | None = None,
        top_p: float | None = None,
        sampling: SamplingSettings | None = None,
        seed: int | None = None,
        stop_token_ids: frozenset[int] = frozenset(),
        plan: TreePlan | None = None,
    ) -> Iterator[Round]:
        """Generate after a prompt, one round at a time.

        Args:
            prompt_ids: at least one token.
            max_new_tokens: exact upper limit of generated tokens.
            temperature: 0 is greedy; None takes that of `sampling`; so does `top_p`.
            sampling: None takes the config's.
            seed: makes sampling repeatable; None draws one.
            stop_token_ids: besides the target's end tokens. A stop token ends the generation
                and is the last token given.
            plan: tree of every round; None takes `self.plan`.
        Raises:
            InputError: an empty prompt, no token to generate, more than the context holds, or
                sampling settings that the target's vocabulary does not have.
        """
        plan = plan or self.plan
        self.check_fits(prompt_ids, max_new_tokens, plan.total_tokens)
        self._reserve_draft_cache(plan)
        settings = sampling or SamplingSettings.of(self.config)
        if temperature is not None:
            settings = replace(settings, temperature=temperature)
        if top_p is not None:
            settings = replace(settings, top_p=top_p)
        settings.check_vocabulary(self.target.vocab_size)
        sampler = Sampler(settings, seed, prompt_ids)
        stops = stop_token_ids | self.target.eos_token_ids
        left = max_new_tokens
        for done in self._rounds(prompt_ids, plan, sampler):
            kept = _until_stop(done.tokens[:left], stops)
            yield replace(
                done,
                tokens=done.tokens[:kept],
                drafted=done.drafted[:kept],
                logprobs=done.logprobs[:kept],
            )
            left -= kept
            if left == 0 or done.tokens[kept - 1] in stops:
                return

    def _rounds(
        self, prompt_ids: Sequence[int], plan: TreePlan, sampler: Sampler
    ) -> Iterator[Round]:
        """Rounds without end; each pass is untrimmed."""
        ids_T = torch.tensor(prompt_ids)
        speculate = plan.total_tokens > 1
        layers = self.feature_layers if speculate else ()
        features_TLH = self.prefill(ids_T, layers)
        last_id = sampler.first(self.target.logits(features_TLH[-1:, -1])[0])
        yield Round((last_id,), (False,), 0, logprobs=tuple(sampler.logprobs))
        next_ids_T = torch.cat((ids_T[1:], torch.tensor([last_id])))
        # Features of committed tokens that the head has not read, and the tokens after them.
        unread = (features_TLH, next_ids_T)
        ngrams = None
        if speculate and self.config.ngram_match:
            ngrams = NgramIndex((*prompt_ids, last_id), self.config.ngram_match)
        while True:
            tree = DraftTree.root_only(last_id)
            if speculate and self.head is not None:
                tree = self._draft(unread, last_id, plan)
            if ngrams is not None:
                copied = ngrams.continuations(self.config.ngram_branches, plan.depth + 1)
                tree = merge(tree, copied, plan.total_tokens)
            verification, features_PLH = self._verify(tree, sampler, layers)
            path, bonus_id = verification.path, verification.bonus_id
            tokens = (*(int(tree.token_ids_N[node]) for node in path[1:]), bonus_id)
            unread = (features_PLH, torch.tensor(tokens))
            if ngrams is not None:
                ngrams.append(tokens)
            last_id = bonus_id
            drafted = (True,) * (len(tokens) - 1) + (False,)
            ranks = tuple(tree.ranks[node] for node in path[1:])
            logprobs = tuple(sampler.logprobs[-len(tokens) :])
            yield Round(tokens, drafted, tree.size, ranks, logprobs)

    def prefill(self, ids_T: Tensor, layers: Sequence[int] = ()) -> Tensor:
        """Start anew: fill the cache with a prompt [T]; returns its features [T, L, H].

        `layers` as in `Target.cached_features`: empty for the final feature alone.
        """
        self._cache.rewind(0)
        if self._draft_cache is not None:
            self._draft_cache.committed = self._draft_cache.length = 0
        positions_T = torch.arange(len(ids_T))
        return self.target.cached_features(ids_T, positions_T, self._cache, layers=layers)

    def _reserve_draft_cache(self, plan: TreePlan) -> None:
        """Rows for the longest sequence and, behind it, for all levels that a tree expands.

        Those are more rows than the tree keeps nodes.
        """
        rows = self.max_context + plan.depth * plan.top_k
        if self.head is None:
            return
        if self._draft_cache is None or self._draft_cache.max_tokens < rows:
            self._draft_cache = self.head.new_cache(rows)

    @torch.inference_mode()
    def _draft(self, unread: tuple[Tensor, Tensor], last_id: int, plan: TreePlan) -> DraftTree:
        root = self._read(unread)
        assert self.head is not None and self._draft_cache is not None
        return draft_tree(self.head, self._draft_cache, root, last_id, plan)

    @torch.inference_mode()
    def _read(self, unread: tuple[Tensor, Tensor]) -> DraftOutput:
        assert self.head is not None and self._draft_cache is not None
        features_TLH, next_ids_T = unread
        next_ids_T = next_ids_T.to(features_TLH.device)
        return self.head.extend(self._draft_cache, features_TLH, next_ids_T)

    @torch.inference_mode()
    def _verify(
        self, tree: DraftTree, sampler: Sampler, layers: Sequence[int]
    ) -> tuple[Verification, Tensor]:
        """One target pass over the tree; commits the accepted path and gives its features."""
        start = self._cache.length
        features_NLH, logits_NV = self._target_pass(tree, layers)
        verification = sampler.verify(tree, logits_NV)
        self._cache.commit(start, verification.path)
        return verification, features_NLH[list(verification.path)]

    def verify_only(self, tree: DraftTree) -> Tensor:
        """The target's logits [N, V] on a tree, leaving the cache as it was."""
        start = self._cache.length
        _, logits_NV = self._target_pass(tree, self.feature_layers)
        self._cache.rewind(start)
        return logits_NV

    def _target_pass(self, tree: DraftTree, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Features [N, L, H] and logits [N, V] of a tree appended to the cache."""
        start = self._cache.length
        sees_NC = None
        if tree.size > 1:
            before = torch.ones((tree.size, start), dtype=torch.bool)
            sees_NC = torch.cat((before, tree.sees_NN), dim=1)
        features_NLH = self.target.cached_features(
            tree.token_ids_N, tree.depths_N + start, self._cache, sees_NC, layers
        )
        return features_NLH, self.target.logits(features_NLH[:, -1])

    def check_fits(self, prompt_ids: Sequence[int], max_new_tokens: int, total_tokens: int) -> None:
        """Raise InputError where prompt, output and a tree do not fit the context together."""
        if not prompt_ids:
            raise InputError("the prompt is empty; give at least one token")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens={max_new_tokens} generates nothing; give 1 or more")
        needed = len(prompt_ids) + max_new_tokens + total_tokens
        if needed > self.max_context:
            raise InputError(
                f"{len(prompt_ids)} prompt tokens + {max_new_tokens} new tokens + a tree of "
                f"{total_tokens} need {needed} positions, but the context holds "
                f"{self.max_context}; shorten the prompt, lower max_new_tokens, or raise "
                "decode.max_context (up to the model's own limit)"
            )


def _until_stop(tokens: tuple[int, ...], stops: frozenset[int]) -> int:
    """How many tokens there are up to and including the first stop token."""
    for index, token in enumerate(tokens):
        if token in stops:
            return index + 1
    return len(tokens)
