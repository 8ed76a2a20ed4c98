"""Ranks against a sort, metrics against a loop over the samples."""

from __future__ import annotations

import math

import pytest
import torch

from teracon_fast.errors import ShapeError, TeraconError
from teracon_fast.reference.metrics import accuracy, hit_at, mrr_at, ndcg_at, target_rank, top_labels


def sorted_rank(scores: list[float], target: int) -> int:
    """Position of the target when labels are sorted by falling score, equal scores by rising index."""
    return sorted(range(len(scores)), key=lambda label: (-scores[label], label)).index(target)


@pytest.mark.parametrize("distinct_scores", [2, 5, 1000])
def test_rank_is_the_position_in_a_stable_sort_also_with_ties(distinct_scores: int) -> None:
    scores = torch.randint(distinct_scores, (40, 30)).float() / 7
    target = torch.randint(30, (40,))
    expected = [sorted_rank(row, t) for row, t in zip(scores.tolist(), target.tolist(), strict=True)]
    rank = target_rank(scores, target)
    assert rank.dtype == torch.int64 and rank.tolist() == expected


def test_rank_with_infinite_scores() -> None:
    scores = torch.tensor([[-math.inf, 1.0, -math.inf, math.inf]])
    assert [int(target_rank(scores, torch.tensor([t]))) for t in range(4)] == [2, 1, 3, 0]


def test_rank_refuses_nan_and_shapes_that_do_not_fit() -> None:
    with pytest.raises(TeraconError, match="1 of 6 scores are NaN"):
        target_rank(torch.tensor([[0.0, math.nan, 1.0], [0.0, 1.0, 2.0]]), torch.tensor([0, 1]))
    with pytest.raises(ShapeError, match=r"got \[2, 3\] and \[3\]"):
        target_rank(torch.zeros(2, 3), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("k", [1, 5, 20])
def test_metrics_are_means_over_the_samples(k: int) -> None:
    rank = torch.randint(30, (200,))
    hits = [r < k for r in rank.tolist()]
    inside = [r for r in rank.tolist() if r < k]
    assert hit_at(rank, k) == pytest.approx(sum(hits) / 200, rel=1e-13)
    assert mrr_at(rank, k) == pytest.approx(sum(1 / (r + 1) for r in inside) / 200, rel=1e-13)
    assert ndcg_at(rank, k) == pytest.approx(sum(1 / math.log(r + 2, 2) for r in inside) / 200, rel=1e-13)


def test_accuracy_is_the_share_of_targets_with_the_highest_score() -> None:
    scores, target = torch.randn(64, 6), torch.randint(6, (64,))
    expected = (scores.argmax(dim=1) == target).double().mean().item()
    assert accuracy(target_rank(scores, target)) == expected


def test_top_labels_by_hand() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, -torch.inf, 0.0, 5.0]])
    best, labels = top_labels(scores, 3)
    assert labels.tolist() == [[1, 2, 3], [3, 0, 2]] and best.tolist() == [[3.0, 3.0, 2.0], [5.0, 0.0, 0.0]]
    best, labels = top_labels(scores, 4, [torch.tensor([2, 1]), torch.tensor([], dtype=torch.int64)])
    assert labels.tolist() == [[3, 0, -1, -1], [3, 0, 2, -1]]
    assert scores[0, 1] == 3.0, "what was given stays as it was"
