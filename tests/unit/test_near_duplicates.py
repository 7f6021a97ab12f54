"""MinHash against the exact overlap, and clusters against order."""

import random

import numpy as np
import pytest

from core.data.conversations import Message
from core.data.near_duplicates import (
    PERMUTATIONS,
    SHINGLE_WORDS,
    near_duplicates,
    rows_per_band,
    signature,
)


def words(rng, count):
    return [f"w{rng.randrange(10**6)}" for _ in range(count)]


def sign(text):
    return signature((Message("user", text),))


def overlap(a, b):
    """Jaccard's index of the sets of five-word runs, exactly."""
    one, other = (
        {tuple(w[i : i + SHINGLE_WORDS]) for i in range(len(w) - SHINGLE_WORDS + 1)} for w in (a, b)
    )
    return len(one & other) / len(one | other)


@pytest.mark.parametrize("changed", [0, 3, 10, 30, 100])
def test_signatures_estimate_the_overlap(changed):
    rng = random.Random(changed)
    errors = []
    for _ in range(20):
        one = words(rng, 1000)
        other = list(one)
        for place in rng.sample(range(1000), changed):
            other[place] = "x"
        estimate = float((sign(" ".join(one)) == sign(" ".join(other))).mean())
        errors.append(estimate - overlap(one, other))
    # One estimate has a standard deviation of at most 0.5 / sqrt(128); the mean of 20 a tenth.
    assert abs(np.mean(errors)) < 4 * 0.5 / np.sqrt(PERMUTATIONS * 20)
    assert np.max(np.abs(errors)) < 4.5 * 0.5 / np.sqrt(PERMUTATIONS)


def test_signatures_of_short_and_of_unspaced_texts():
    assert (sign("yes") == sign("Yes!")).all()
    assert (sign("yes") == sign("no")).mean() < 0.1
    assert (sign("") == sign("…")).all()
    chinese = "人工智能正在改变我们的生活方式和工作方式以及学习方式"
    other = "今天的天气非常好我们一起去公园散步看花听鸟唱歌吧好不好"
    assert 0.5 < (sign(chinese) == sign(chinese + "吗")).mean() < 1
    assert (sign(chinese) == sign(other)).mean() < 0.1


def test_a_pair_at_the_threshold_is_compared():
    for similarity in (0.3, 0.5, 0.8, 0.95):
        rows = rows_per_band(similarity)
        assert 1 - (1 - similarity**rows) ** (PERMUTATIONS // rows) >= 0.99
    assert rows_per_band(0.9) > rows_per_band(0.5)


def corpus(rng):
    """Texts in families: a first, and copies of it with few words changed; and loners."""
    texts, family = [], []
    for number in range(40):
        first = words(rng, 300)
        for _ in range(rng.choice([1, 1, 2, 5])):
            copy = list(first)
            for place in rng.sample(range(300), 3):
                copy[place] = "y"
            texts.append(" ".join(copy))
            family.append(number)
    return texts, family


def test_one_of_each_family_stays_and_order_does_not_decide_which():
    rng = random.Random(5)
    texts, family = corpus(rng)
    signatures_NP = np.stack([sign(text) for text in texts])
    rank_N = np.array(rng.sample(range(len(texts)), len(texts)), dtype=np.int64)
    gone_N = near_duplicates(signatures_NP, rank_N, 0.6)
    for number in set(family):
        members = [i for i, one in enumerate(family) if one == number]
        assert [i for i in members if not gone_N[i]] == [min(members, key=lambda i: rank_N[i])]
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(texts))
        assert (near_duplicates(signatures_NP[order], rank_N[order], 0.6) == gone_N[order]).all()
    assert not near_duplicates(signatures_NP[:0], rank_N[:0], 0.8).any()


def test_what_shares_a_band_but_not_enough_stays():
    rng = random.Random(6)
    start = words(rng, 150)
    texts = [" ".join(start + words(rng, 150)) for _ in range(30)]
    signatures_NP = np.stack([sign(text) for text in texts])
    assert not near_duplicates(signatures_NP, np.arange(30), 0.8).any()
