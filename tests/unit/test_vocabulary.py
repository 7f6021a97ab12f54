from __future__ import annotations

import pytest
import torch

from core.draft.vocabulary import DraftVocabulary
from core.errors import ConfigError, ShapeError

COUNTS_V = torch.tensor([0, 5, 3, 5, 0, 9, 3])


def test_the_most_frequent_tokens_in_ascending_order() -> None:
    vocabulary = DraftVocabulary.from_counts(COUNTS_V, 3)
    assert vocabulary.d2t_W.tolist() == [1, 3, 5]
    assert (vocabulary.size, vocabulary.target_size, vocabulary.is_whole) == (3, 7, False)


def test_ties_go_to_the_lower_id() -> None:
    assert DraftVocabulary.from_counts(COUNTS_V, 4).d2t_W.tolist() == [1, 2, 3, 5]
    assert DraftVocabulary.from_counts(COUNTS_V, 6).d2t_W.tolist() == [0, 1, 2, 3, 5, 6]


@pytest.mark.parametrize("size", [0, 7, 100])
def test_all_tokens(size: int) -> None:
    vocabulary = DraftVocabulary.from_counts(COUNTS_V, size)
    assert vocabulary.is_whole and vocabulary.d2t_W.tolist() == list(range(7))


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 means all tokens"):
        DraftVocabulary.from_counts(COUNTS_V, -1)


def test_the_way_back() -> None:
    vocabulary = DraftVocabulary.from_counts(COUNTS_V, 3)
    assert vocabulary.t2d_V.tolist() == [-1, 0, -1, 1, -1, 2, -1]
    assert vocabulary.t2d_V[vocabulary.d2t_W].tolist() == [0, 1, 2]


def test_rows() -> None:
    matrix_VH = torch.randn(9, 4)  # an embedding may have more rows than the target has tokens
    vocabulary = DraftVocabulary.from_counts(COUNTS_V, 3)
    assert torch.equal(vocabulary.rows(matrix_VH), matrix_VH[[1, 3, 5]])
    assert torch.equal(DraftVocabulary.whole(7).rows(matrix_VH), matrix_VH[:7])
    with pytest.raises(ShapeError, match="6 rows for a target vocabulary of 7"):
        vocabulary.rows(matrix_VH[:6])


def test_coverage() -> None:
    assert DraftVocabulary.from_counts(COUNTS_V, 3).coverage(COUNTS_V) == pytest.approx(19 / 25)
    assert DraftVocabulary.whole(7).coverage(COUNTS_V) == 1
    assert DraftVocabulary.whole(7).coverage(torch.zeros(7)) == 0
