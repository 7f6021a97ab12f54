"""The speculative decoder: a batch of sequences that requests join and leave between rounds.

A round has four phases: draft a tree for each sequence from the target's features, verify all of
them in one target pass, commit each one's accepted path, and let the head read what was committed
when the next round begins. Prompts are read in the same passes, a chunk a round. Decoding without
speculation is the same loop with trees of the root alone.

Shapes: N tokens of a piece, L feature layers, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import count
from time import perf_counter

import torch
from torch import Tensor

from core.config import DecodeConfig
from core.decode.batch_policy import BatchPolicy, PolicyRound
from core.decode.drafting import Drafter, GrowthRule, HeadDrafter
from core.decode.forward import Piece, target_pass
from core.decode.ngram import NgramIndex, merge
from core.decode.phases import PhaseSeconds
from core.decode.requests import DecodedSequence, Event, Request, Round
from core.decode.rows import RowCache, Stretch
from core.decode.sampling import SamplingSettings
from core.decode.scheduler import Scheduler
from core.decode.tree import PLAIN, DraftTree, TreePlan
from core.draft.base import DraftHead
from core.errors import BusyError, ConfigError, InputError
from core.models.ragged import use_ragged_attention
from core.models.target import Target

# Tokens of a sequence whose features wait for the head while drafting pauses, at most.
MOST_UNREAD = 128


class SpeculativeDecoder:
    """Decodes many requests at once; not thread-safe.

    Guarantee: at temperature 0 the tokens of target-only decoding, as long as floating-point
    rounding leaves the target's argmax alone; above it, samples of the same distribution.

    Attributes:
        plan: tree of requests that name none.
        policy: chooses the trees of those requests anew in each round; None keeps to `plan`.
    """

    def __init__(
        self,
        target: Target,
        head: DraftHead | None,
        config: DecodeConfig,
        *,
        drafter: Drafter | None = None,
        dense_attention: bool = False,
    ) -> None:
        """Get ready to decode.

        Args:
            target: loaded by `load_target`; its attention is replaced by one that takes several
                sequences, and stays torch's own for everything else.
            head: with the target attached and prepared for inference; None for plain decoding.
            config: tree, sampling defaults, context length, sizes of batch and cache.
            drafter: proposes trees in place of the head.
            dense_attention: attend by transformers' own code and a mask over all of the cache,
                which is slow: the reference that the other is tested against.
        Raises:
            ConfigError: the head reads layers that the target does not have.
            InputError: an attention that trees or batches would change.
        """
        target.check_output_head()
        use_ragged_attention(target.model)
        self.target, self.head, self.config = target, head, config
        self.max_context = min(config.max_context, target.max_position)
        if drafter is None and head is not None:
            drafter = HeadDrafter(head, config.cache_tokens)
        self.drafter = drafter
        # Decoding plainly computes no features but the final one.
        self.feature_layers = () if drafter is None else drafter.feature_layers(target.num_layers)
        self._dense = dense_attention
        self._cache = RowCache(target.model.config, config.cache_tokens, self.max_context)
        self.scheduler = Scheduler(config, self._move)
        self._ids = count()
        self._streams: dict[int, deque[Event]] = {}
        self._untold: list[Event] = []
        self.policy: BatchPolicy | None = None
        self.plan = PLAIN
        if config.total_tokens != "auto":
            self.plan = self.plan_of(config.total_tokens)

    def plan_of(self, total_tokens: int) -> TreePlan:
        """A fixed tree size with the configured depth and top-k."""
        if total_tokens == 1:
            return PLAIN
        if self.drafter is None and not self.config.ngram_match:
            raise ConfigError(
                f"decode.total_tokens={total_tokens} needs a draft head; set draft.path, or "
                "decode.ngram_match to draft by copying alone"
            )
        return TreePlan(total_tokens, self.config.depth, self.config.top_k)

    def longest(self, plan: TreePlan) -> int:
        """Most tokens of prompt and output together for which context and cache have room."""
        rows = self.scheduler.space.num_rows
        if self.policy is not None and plan == self.plan:
            plan = self.policy.largest
        return min(self.max_context - plan.total_tokens, rows - _tree_rows(plan))

    # Requests

    def submit(self, request: Request) -> int:
        """Queue a request; the number by which events name it.

        Raises:
            InputError: an empty prompt, no token to generate, more than context or cache hold, or
                sampling settings that the target's vocabulary does not have.
            BusyError: too many wait already.
        """
        adaptive = request.plan is None and self.policy is not None
        plan = request.plan or (self.policy.largest if self.policy else self.plan)
        self.check_fits(request.prompt_ids, request.max_new_tokens, plan)
        request.settings.check_vocabulary(self.target.vocab_size)
        speculates = plan.total_tokens > 1
        ngrams = None
        if speculates and self.config.ngram_match:
            ngrams = NgramIndex(request.prompt_ids, self.config.ngram_match)
        sequence = DecodedSequence(
            id=next(self._ids),
            request=request,
            plan=plan,
            stops=request.stop_token_ids | self.target.eos_token_ids,
            num_rows=len(request.prompt_ids) + request.max_new_tokens + _tree_rows(plan),
            drafted=speculates and self.drafter is not None,
            ngrams=ngrams,
            adaptive=adaptive,
        )
        self.scheduler.add(sequence)
        return sequence.id

    def cancel(self, request_id: int) -> None:
        """Give a request up, if it has not ended: there are no more events of it."""
        self._untold = [event for event in self._untold if event.request_id != request_id]
        for sequence in (*self.scheduler.running, *self.scheduler.waiting):
            if sequence.id == request_id:
                self.scheduler.end(sequence)

    def reset(self) -> None:
        """Give all requests up and forget what was computed, as after a round that failed."""
        self.scheduler = Scheduler(self.config, self._move)
        self._untold = []

    @torch.inference_mode()
    def occupy_memory(self) -> None:
        """Decode a token, and have memory behind all of the caches.

        On CPU a row takes memory when it is written first. A server had better have all it will
        ever need when it starts: what does not fit shows there, and not under load.

        Raises:
            BusyError: requests are at work, whose rows would be lost.
        """
        if self.busy:
            raise BusyError("the caches are in use; occupy their memory before the first request")
        for _ in self.generate([0], max_new_tokens=1, temperature=0, plan=PLAIN):
            pass
        self._cache.occupy()
        if isinstance(self.drafter, HeadDrafter):
            self.drafter.cache.joint.zero_()
        # Rows that others might have begun with are lost.
        self.reset()

    @property
    def busy(self) -> bool:
        """Whether any request waits or is at work, or has events that nobody was told of."""
        return bool(self.scheduler.running or self.scheduler.waiting or self._untold)

    def step(self) -> list[Event]:
        """One round of all sequences: what it committed to each, those of `generate` left out."""
        self._tell(self._round())
        events, self._untold = self._untold, []
        return events

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
        """Generate after a prompt, one round at a time; other requests go on meanwhile.

        Args:
            prompt_ids: at least one token.
            max_new_tokens: exact upper limit of generated tokens.
            temperature: 0 is greedy; None takes that of `sampling`; so does `top_p`.
            sampling: None takes the config's.
            seed: makes sampling repeatable; None draws one.
            stop_token_ids: as of `Request`.
            plan: tree of every round; None takes `self.plan`.
        Raises:
            UserError: see `submit`.
        """
        settings = sampling or SamplingSettings.of(self.config)
        if temperature is not None:
            settings = replace(settings, temperature=temperature)
        if top_p is not None:
            settings = replace(settings, top_p=top_p)
        request = Request(prompt_ids, max_new_tokens, settings, seed, stop_token_ids, plan)
        with closing(self.stream(request)) as events:
            for event in events:
                yield event.round

    def stream(self, request: Request) -> Generator[Event, None, None]:
        """The events of one request; closing it cancels.

        Raises:
            UserError: see `submit`.
        """
        request_id = self.submit(request)
        mine: deque[Event] = deque()
        self._streams[request_id] = mine
        try:
            ended = False
            while not ended:
                while not mine:
                    self._tell(self._round())
                event = mine.popleft()
                ended = event.ending is not None
                yield event
        finally:
            del self._streams[request_id]
            self.cancel(request_id)

    def check_fits(self, prompt_ids: Sequence[int], max_new_tokens: int, plan: TreePlan) -> None:
        """Raise InputError where context or cache have no room for prompt, output and a tree."""
        if not prompt_ids:
            raise InputError("the prompt is empty; give at least one token")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens={max_new_tokens} generates nothing; give 1 or more")
        needed, longest = len(prompt_ids) + max_new_tokens, self.longest(plan)
        if needed > longest:
            in_context = longest == self.max_context - plan.total_tokens
            raise InputError(
                f"{len(prompt_ids)} prompt tokens + {max_new_tokens} new tokens are {needed}, but "
                f"beside a tree of {plan.total_tokens} the longest sequence is {longest}; shorten "
                "the prompt, lower max_new_tokens, or raise "
                + (
                    f"decode.max_context={self.max_context} (up to the model's own limit)"
                    if in_context
                    else f"decode.cache_tokens={self.config.cache_tokens}"
                )
            )

    # A round

    @torch.inference_mode()
    def _round(self) -> list[Event]:
        """Draft, verify and commit; prompts go on by a chunk."""
        self.scheduler.admit()
        began = perf_counter()
        chunks = self.scheduler.chunks()
        choice = self._begin_choice(sum(size for _, size in chunks), len(chunks))
        trees = self._draft(choice)
        drafted = perf_counter()
        pieces = [
            *(Piece.of_tree(one.first_row, one.cached, tree) for one, tree in trees),
            *(_chunk(one, size) for one, size in chunks),
        ]
        if not pieces:
            return []
        sequences = [one for one, _ in (*trees, *chunks)]
        layers = self.feature_layers if any(one.drafted for one in sequences) else ()
        started = self.policy.clock() if self.policy else 0.0
        read = target_pass(self.target, self._cache, pieces, layers, dense=self._dense)
        rounds = self._commit(trees, read[: len(trees)])
        if choice is not None:
            self._end_choice(choice, rounds, sum(piece.size for piece in pieces), started)
        rounds += _advance(chunks, read[len(trees) :])
        # Choosing tokens has waited for a GPU's pass; the next one's trees wait for themselves.
        _note_seconds(trees, chunks, drafted - began, perf_counter() - drafted)
        for sequence, _ in rounds:
            if sequence.ending is not None:
                self.scheduler.end(sequence)
        return [Event(one.id, done, one.ending, one.seconds) for one, done in rounds]

    def _begin_choice(self, prompt_tokens: int, prompts: int) -> PolicyRound | None:
        """What the policy says of this round, if it has a say in any sequence's tree."""
        decoding = [one for one in self.scheduler.running if not one.prefilling]
        adaptive = [one for one in decoding if one.adaptive]
        if self.policy is None or not adaptive:
            return None
        fixed = [one for one in decoding if not one.adaptive]
        return self.policy.begin(
            [one.record for one in adaptive],
            prompt_tokens=prompt_tokens,
            fixed_tokens=sum(one.plan.total_tokens for one in fixed),
            others=prompts + len(fixed),
        )

    def _draft(self, choice: PolicyRound | None) -> list[tuple[DecodedSequence, DraftTree]]:
        """A tree for each sequence that decodes."""
        running = self.scheduler.running
        decoding = [sequence for sequence in running if not sequence.prefilling]
        drafts: dict[int, DraftTree | None] = {}
        wanting = [
            one for one in running if one.drafted and (choice is None or self._asks(one, choice))
        ]
        if wanting:
            assert self.drafter is not None
            rule: GrowthRule | None = None
            if choice is not None and self.policy is not None:
                rule = partial(self.policy.width, choice) if choice.drafts else _no_growth
            started = self.policy.clock() if self.policy else 0.0
            trees = self.drafter.draft(wanting, rule)
            drafts = {one.id: tree for one, tree in zip(wanting, trees, strict=True)}
            if choice is not None and self.policy is not None and choice.drafts:
                choice.draft_seconds = self.policy.clock() - started
        found = [(one, self._with_copies(one, drafts.get(one.id))) for one in decoding]
        return found if choice is None else self._chosen(choice, found)

    @staticmethod
    def _asks(sequence: DecodedSequence, choice: PolicyRound) -> bool:
        """Whether the drafter is asked for a sequence; some that is unread can wait."""
        return choice.drafts or not sequence.adaptive or sequence.num_unread >= MOST_UNREAD

    def _chosen(
        self, choice: PolicyRound, found: Sequence[tuple[DecodedSequence, DraftTree]]
    ) -> list[tuple[DecodedSequence, DraftTree]]:
        """The same trees, cut by the policy where they are adaptive."""
        assert self.policy is not None
        parts = iter(self.policy.choose(choice, [tree for one, tree in found if one.adaptive]))
        return [(one, next(parts) if one.adaptive else tree) for one, tree in found]

    def _end_choice(
        self,
        choice: PolicyRound,
        rounds: Sequence[tuple[DecodedSequence, Round]],
        nodes: int,
        started: float,
    ) -> None:
        """Tell the policy what a round gave and took."""
        assert self.policy is not None
        seconds = self.policy.clock() - started
        tokens = sum(len(done.tokens) for one, done in rounds if one.adaptive)
        self.policy.ended(choice, tokens, nodes, seconds)

    def _with_copies(self, sequence: DecodedSequence, draft: DraftTree | None) -> DraftTree:
        """A draft, if there is one, and what followed where the text read the same before."""
        tree = draft or DraftTree.root_only(sequence.tokens[-1])
        if sequence.ngrams is None:
            return tree
        plan = sequence.plan
        copies = sequence.ngrams.continuations(self.config.ngram_branches, plan.depth + 1)
        return merge(tree, copies, plan.total_tokens)

    def _commit(
        self,
        trees: Sequence[tuple[DecodedSequence, DraftTree]],
        read: Sequence[tuple[Tensor, Tensor]],
    ) -> list[tuple[DecodedSequence, Round]]:
        """Verify each tree, and bring the rows of its accepted path together."""
        rounds, sources, targets = [], [], []
        for (sequence, tree), (features_NLH, logits_NV) in zip(trees, read, strict=True):
            verification = sequence.sampler.verify(tree, logits_NV)
            path = torch.tensor(verification.path)
            begin = sequence.first_row + sequence.cached
            moved = path != torch.arange(len(path))
            sources.append((path + begin)[moved])
            targets.append((torch.arange(len(path)) + begin)[moved])
            if sequence.drafted:
                sequence.unread.append(features_NLH[path.to(features_NLH.device)])
            if self.policy is not None:
                self.policy.acceptance.learn(tree, verification.path, sequence.record)
            rounds.append((sequence, sequence.commit(tree, verification)))
        if any(len(rows) for rows in sources):
            self._cache.move(torch.cat(sources), torch.cat(targets))
        return rounds

    def _move(self, source: Stretch, target: Stretch, count: int) -> None:
        rows = torch.arange(count)
        self._cache.move(rows + source.first, rows + target.first)
        if self.drafter is not None:
            self.drafter.move(source, target, count)

    def _tell(self, events: Sequence[Event]) -> None:
        for event in events:
            self._streams.get(event.request_id, self._untold).append(event)


def _no_growth(*levels: object) -> int:
    """For a drafter that is only to read: no node is expanded."""
    return 0


def _chunk(sequence: DecodedSequence, size: int) -> Piece:
    begin, end = sequence.cached, sequence.cached + size
    num_logits = int(end == len(sequence.tokens))
    return Piece.of_text(sequence.first_row, begin, sequence.tokens[begin:end], num_logits)


def _advance(
    chunks: Sequence[tuple[DecodedSequence, int]], read: Sequence[tuple[Tensor, Tensor]]
) -> list[tuple[DecodedSequence, Round]]:
    """Note what was read of prompts; those that are through get their first token."""
    rounds = []
    for (sequence, size), (features_NLH, logits_NV) in zip(chunks, read, strict=True):
        sequence.cached += size
        if sequence.drafted:
            sequence.unread.append(features_NLH)
        if len(logits_NV):
            rounds.append((sequence, sequence.begin(sequence.sampler.first(logits_NV[0]))))
    return rounds


def _note_seconds(
    trees: Sequence[tuple[DecodedSequence, DraftTree]],
    chunks: Sequence[tuple[DecodedSequence, int]],
    draft: float,
    verify: float,
) -> None:
    """Those who share a round share its seconds."""
    for sequence, _ in trees:
        sequence.seconds += PhaseSeconds(draft=draft, verify=verify)
    for sequence, _ in chunks:
        sequence.seconds += PhaseSeconds(prefill=verify)


def _tree_rows(plan: TreePlan) -> int:
    """Cache rows behind the text: what is verified, or all levels that a head expands."""
    return max(plan.total_tokens, plan.depth * plan.top_k)
