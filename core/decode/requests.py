"""What is asked of the decoder, and what it tells of each answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from core.decode.acceptance import RequestRecord
from core.decode.grammar import Constraint
from core.decode.ngram import NgramIndex
from core.decode.phases import NO_SECONDS, PhaseSeconds
from core.decode.rows import Stretch
from core.decode.sampler import Sampler, TokenLogprobs
from core.decode.sampling import SamplingSettings
from core.decode.tree import DraftTree, TreePlan
from core.decode.verify import Verification

Ending = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """A prompt to answer.

    Attributes:
        prompt_ids: at least one token.
        max_new_tokens: exact upper limit, at least 1.
        settings: how tokens are chosen.
        seed: of the random numbers; None draws one.
        stop_token_ids: besides the target's end tokens. A stop token ends the answer and is the
            last token given.
        plan: tree of every round; None takes the decoder's, or leaves it to its policy.
        with_trees: whether its rounds tell the trees that were verified.
        constraint: that the answer must follow; of this request alone, since it goes on with it.
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    plan: TreePlan | None = None
    with_trees: bool = False
    constraint: Constraint | None = None


@dataclass(frozen=True)
class Round:
    """What one target pass committed to a sequence.

    Attributes:
        tokens: committed tokens, at least one.
        drafted: for each, whether it had been guessed, by the draft head or by copying.
        tree_size: nodes verified; 0 for the prompt's pass (prefill), which drafts nothing.
        ranks: reranking places of the accepted nodes (for the tree policy), uncut.
        logprobs: one for each token where the request's settings ask for them, else none.
        tree: that was verified, where the request asks for it; None for the prompt's pass.
        path: its accepted nodes, root first, uncut.
    """

    tokens: tuple[int, ...]
    drafted: tuple[bool, ...]
    tree_size: int
    ranks: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    tree: DraftTree | None = None
    path: tuple[int, ...] = ()


@dataclass(frozen=True)
class Event:
    """A round of one of the requests.

    Attributes:
        request_id: as `submit` gave it.
        round: what was committed.
        ending: why this round is the last one; None if it is not.
        seconds: that the request's rounds have taken so far, this one included.
    """

    request_id: int
    round: Round
    ending: Ending | None
    seconds: PhaseSeconds = NO_SECONDS


@dataclass(eq=False)
class DecodedSequence:
    """A request at work.

    Attributes:
        id: as `submit` gave it.
        request: what is asked.
        plan: tree of its rounds; where it is adaptive, the largest.
        stops: tokens that end it.
        num_rows: of the caches, that it may need.
        drafted: whether a drafter reads its features.
        ngrams: its text, where what followed before is drafted too.
        adaptive: whether each round's tree is chosen anew.
        record: how its drafted nodes fared.
        tokens: prompt and answer, committed.
        stretch: its rows; None while it waits.
        cached: tokens whose rows the target's cache holds; without the last one, while it decodes.
        read: of those, the ones that the draft head has read.
        unread: features [T, L, H] of the others, in order.
        seconds: that its rounds have taken.
    """

    id: int
    request: Request
    plan: TreePlan
    stops: frozenset[int]
    num_rows: int
    drafted: bool = False
    ngrams: NgramIndex | None = None
    adaptive: bool = False
    record: RequestRecord = field(default_factory=RequestRecord)
    tokens: list[int] = field(init=False)
    sampler: Sampler = field(init=False)
    stretch: Stretch | None = None
    cached: int = 0
    read: int = 0
    unread: list[Tensor] = field(default_factory=list)
    seconds: PhaseSeconds = NO_SECONDS

    def __post_init__(self) -> None:
        request = self.request
        self.tokens = list(request.prompt_ids)
        self.sampler = Sampler(
            request.settings, request.seed, request.prompt_ids, request.constraint
        )

    @property
    def first_row(self) -> int:
        """Row where it begins."""
        assert self.stretch is not None, "it waits"
        return self.stretch.first

    @property
    def num_new(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def num_unread(self) -> int:
        """Tokens whose features are kept for the draft head."""
        return self.cached - self.read

    @property
    def prefilling(self) -> bool:
        """Whether some of the prompt has not been through the target."""
        return self.num_new == 0

    def begin(self, token: int) -> Round:
        """Commit the token after the prompt."""
        self._append((token,))
        return Round((token,), (False,), 0, logprobs=tuple(self.sampler.logprobs))

    def commit(self, tree: DraftTree, verification: Verification) -> Round:
        """Commit what was accepted, up to the limit or a stop token."""
        path = verification.path
        tokens = [*(int(tree.token_ids_N[node]) for node in path[1:]), verification.bonus_id]
        tokens = tokens[: self.request.max_new_tokens - self.num_new]
        stop = next((i for i, token in enumerate(tokens) if token in self.stops), len(tokens) - 1)
        tokens = tokens[: stop + 1]
        self._append(tokens)
        self.cached += len(path)
        drafted = tuple(place < len(path) - 1 for place in range(len(tokens)))
        ranks = tuple(tree.ranks[node] for node in path[1:])
        logprobs = tuple(self.sampler.logprobs[-len(path) :][: len(tokens)])
        done = Round(tuple(tokens), drafted, tree.size, ranks, logprobs)
        # Kept by who keeps the round: not where nobody wants to see it.
        return replace(done, tree=tree, path=path) if self.request.with_trees else done

    def _append(self, tokens: Sequence[int]) -> None:
        self.tokens += tokens
        if self.ngrams is not None:
            self.ngrams.append(tokens)

    @property
    def ending(self) -> Ending | None:
        """Why it has ended; None if it has not."""
        if self.prefilling:
            return None
        if self.tokens[-1] in self.stops:
            return "stop"
        return "length" if self.num_new >= self.request.max_new_tokens else None
