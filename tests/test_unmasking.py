"""Ranks and the choice of masks to fill."""

import pytest
import torch

from dsc_hf.unmasking import FixedUnmasking, rank


def test_rank_counts_from_the_highest_and_puts_others_behind():
    values = torch.tensor([[0.1, 0.9, 0.5, 0.7]])
    candidates = torch.tensor([[True, False, True, True]])
    assert rank(values, candidates)[0].tolist() == [2, 3, 1, 0]


def test_rank_keeps_the_order_of_equal_values():
    values = torch.zeros(1, 40)
    assert rank(values, torch.ones(1, 40, dtype=torch.bool))[0].tolist() == list(range(40))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_fills_the_most_probable_masks(k):
    confidence = torch.tensor([[0.2, 0.9, 0.4, 0.6, 0.99], [0.3, 0.1, 0.2, 0.0, 0.5]])
    masked = torch.tensor([[True, True, True, True, False], [False, True, False, True, False]])
    chosen = FixedUnmasking(k)(confidence, masked)
    best = [[1, 3, 2, 0], [1, 3]]
    for row in range(2):
        assert set(chosen[row].nonzero()[:, 0].tolist()) == set(best[row][:k])


def test_a_confidence_of_zero_is_still_filled():
    """Else a step would fill nothing and the decode would not end."""
    masked = torch.tensor([[False, True, True]])
    assert FixedUnmasking(1)(torch.zeros(1, 3), masked).sum() == 1


def test_rows_without_masks_fill_nothing():
    assert not FixedUnmasking(3)(torch.ones(2, 4), torch.zeros(2, 4, dtype=torch.bool)).any()
