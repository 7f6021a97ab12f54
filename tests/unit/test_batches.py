from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from core.config import Config
from core.data.batches import pad_right, plan_batches
from core.data.conversations import Conversation

Lengths = npt.NDArray[np.int64]


def _realistic_lengths(seed: int, count: int = 60) -> Lengths:
    """Like conversations: most are short, some reach the limit."""
    lengths = np.random.default_rng(seed).lognormal(5.3, 0.8, count)
    return np.clip(lengths, 8, 1024).astype(np.int64)


def _padded(batch: tuple[int, ...], lengths: Lengths) -> int:
    return len(batch) * int(lengths[list(batch)].max())


@pytest.mark.parametrize("max_tokens", [64, 1024, 4096])
def test_every_example_is_in_one_batch_within_the_budget(max_tokens: int) -> None:
    lengths = _realistic_lengths(0)
    plan = plan_batches(lengths, max_tokens)
    assert sorted(i for batch in plan.batches for i in batch) == list(range(len(lengths)))
    for batch in plan.batches:
        assert _padded(batch, lengths) <= max_tokens or len(batch) == 1
    assert plan.tokens == lengths.sum()
    assert plan.padded_tokens == sum(_padded(batch, lengths) for batch in plan.batches)
    assert plan.waste == pytest.approx(1 - plan.tokens / plan.padded_tokens)


@pytest.mark.parametrize("seed", range(5))
def test_bucketing_keeps_padding_small(seed: int) -> None:
    lengths = _realistic_lengths(seed)
    assert plan_batches(lengths, 4096).waste < 0.1
    in_order = [lengths[i : i + 4] for i in range(0, len(lengths), 4)]
    unsorted = sum(len(batch) * batch.max() for batch in in_order)
    assert 1 - lengths.sum() / unsorted > 0.3, "the lengths are too alike to show anything"


def test_padding_stays_small_over_real_conversations(
    real_conversations: list[Conversation],
) -> None:
    """200 conversations of ShareGPT, in shards of the default size, at the default budget."""
    shards: list[list[int]] = [[]]
    for conversation in real_conversations:
        if sum(shards[-1]) >= Config().data.shard_tokens:
            shards.append([])
        # Four characters a token, which is what SmolLM2's tokenizer comes to.
        characters = sum(len(message.content) for message in conversation.messages)
        shards[-1].append(min(max(8, characters // 4), Config().data.max_length))
    budget = Config().features.batch_tokens
    plans = [plan_batches(shard, budget) for shard in shards]
    padded = sum(plan.padded_tokens for plan in plans)
    tokens = sum(plan.tokens for plan in plans)
    assert len(shards) > 5 and 1 - tokens / padded <= 0.1
    assert sum(len(plan.batches) for plan in plans) < 0.7 * len(real_conversations)
    unsorted = [shard[i : i + 2] for shard in shards for i in range(0, len(shard), 2)]
    without = sum(len(batch) * max(batch) for batch in unsorted)
    assert 1 - tokens / without > 0.1, "the lengths are too alike to show anything"


def test_equal_lengths_fill_the_budget() -> None:
    plan = plan_batches([100] * 10, 400)
    assert [len(batch) for batch in plan.batches] == [2, 4, 4]
    assert plan.waste == 0


def test_the_cut_is_the_cheapest_there_is() -> None:
    """Against every way of cutting a short sorted list."""
    lengths = np.array([3, 4, 9, 10, 11, 30, 32, 64])
    max_tokens = 96
    plan = plan_batches(lengths, max_tokens)

    def cost(batches: Sequence[tuple[int, ...]]) -> float:
        return sum(max_tokens / 32 + _padded(batch, lengths) for batch in batches)

    least = float("inf")
    for cuts in range(2 ** (len(lengths) - 1)):
        batches: list[tuple[int, ...]] = []
        batch = [0]
        for i in range(1, len(lengths)):
            if cuts >> (i - 1) & 1:
                batches.append(tuple(batch))
                batch = []
            batch.append(i)
        batches.append(tuple(batch))
        if all(_padded(batch, lengths) <= max_tokens for batch in batches):
            least = min(least, cost(batches))
    assert cost(plan.batches) == least


def test_an_example_longer_than_the_budget_goes_alone() -> None:
    plan = plan_batches([5, 500, 6], 100)
    assert plan.batches[-1] == (1,)


def test_no_examples_make_no_batches() -> None:
    assert plan_batches([], 100).batches == ()
    assert plan_batches([], 100).waste == 0


def test_padding_is_at_the_right_and_masked() -> None:
    input_ids, mask = pad_right(
        [np.array([7, 8, 9], dtype=np.int32), np.array([5], dtype=np.int32)], padding=1
    )
    assert input_ids.tolist() == [[7, 8, 9], [5, 1, 1]]
    assert mask is not None
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_nothing_to_mask_without_padding() -> None:
    _, mask = pad_right([np.array([7, 8], dtype=np.int32)] * 2)
    assert mask is None
