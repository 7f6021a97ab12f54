"""HF's own answers, and drafts of known texts that are right with a given probability."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch

from core.decode.drafting import GrowthRule
from core.decode.requests import DecodedSequence
from core.decode.rows import Stretch
from core.decode.tree import DraftTree, TreePlan
from core.models.target import Target

Text = tuple[int, ...]


def hf_greedy(target: Target, prompt: Sequence[int], count: int, **settings: object) -> Text:
    """What HF's own `generate` answers at temperature 0."""
    ids_1T = torch.tensor([list(prompt)])
    output = target.model.generate(
        ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=sorted(target.eos_token_ids),
        pad_token_id=0,
        **settings,
    )
    return tuple(output[0, len(prompt) :].tolist())


class OracleDrafter:
    """Trees of random shape; along the right path, each next token is there with `skill`."""

    def __init__(
        self, answers: Mapping[Text, Sequence[int]], vocab_size: int, skill: float
    ) -> None:
        self.answers, self.vocab_size, self.skill = answers, vocab_size, skill
        self.read = 0

    def feature_layers(self, num_layers: int) -> tuple[int, ...]:
        return (num_layers,)

    def draft(
        self, sequences: Sequence[DecodedSequence], rule: GrowthRule | None = None
    ) -> list[DraftTree | None]:
        for one in sequences:
            # As many features as there are tokens that have not been read, and all of them once.
            assert sum(len(part) for part in one.unread) == one.cached - one.read
            one.unread, one.read = [], one.cached
        return [None if one.prefilling else self._tree(one) for one in sequences]

    def move(self, source: Stretch, target: Stretch, count: int) -> None:
        assert count <= min(source.size, target.size)

    def _tree(self, sequence: DecodedSequence) -> DraftTree:
        answer = self.answers[tuple(sequence.request.prompt_ids)]
        rest = list(answer[sequence.num_new :])
        assert tuple(answer[: sequence.num_new]) == tuple(sequence.tokens[-sequence.num_new :])
        return random_tree(sequence.tokens, rest, sequence.plan, self.vocab_size, self.skill)


def random_tree(
    tokens: Sequence[int], rest: Sequence[int], plan: TreePlan, vocab_size: int, skill: float
) -> DraftTree:
    """A tree that is a function of the text: a deterministic draft, as losslessness asks for."""
    draw = random.Random(hash(tuple(tokens)))
    ids, parents, depths = [tokens[-1]], [-1], [0]
    right = [0]
    siblings: set[tuple[int, int]] = set()
    for node in range(1, plan.total_tokens):
        lucky = len(right) <= min(len(rest), plan.depth) and draw.random() < skill
        if lucky and (right[-1], rest[len(right) - 1]) not in siblings:
            parent, token = right[-1], rest[len(right) - 1]
            right.append(node)
        else:
            parent, token = draw.randrange(node), draw.randrange(vocab_size)
            while depths[parent] > plan.depth or (parent, token) in siblings:
                parent, token = draw.randrange(node), draw.randrange(vocab_size)
        siblings.add((parent, token))
        ids.append(token)
        parents.append(parent)
        depths.append(depths[parent] + 1)
    return DraftTree(torch.tensor(ids), tuple(parents), tuple(range(len(ids))))
