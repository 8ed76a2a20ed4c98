"""Public metrics: against a sort of every row, and against the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from teracon_fast.errors import ConfigError, ShapeError
from teracon_fast.reference import metrics as reference
from teracon_fast.train.metrics import (
    backward_transfer,
    forward_transfer,
    headline,
    ranking_metrics,
    result_matrix,
    selection_value,
    task_metrics,
)

NAMES = {"hit@1", "mrr@5", "hit@5", "ndcg@5", "mrr@20", "hit@20", "ndcg@20"}


def brute_force(scores: list[list[float]], targets: list[int]) -> dict[str, float]:
    """Sort the labels of every row (equal scores: lower index first) and look for the target among the first k."""
    sums = dict.fromkeys(NAMES, 0.0)
    for row, target in zip(scores, targets, strict=True):
        order = sorted(range(len(row)), key=lambda label: (-row[label], label))
        for name in NAMES:
            kind, k = name.split("@")
            if target in order[: int(k)]:
                place = order.index(target) + 1
                sums[name] += {"hit": 1.0, "mrr": 1 / place, "ndcg": 1 / math.log2(place + 1)}[kind]
    return {name: total / len(targets) for name, total in sums.items()}


@pytest.mark.parametrize("distinct_scores", [3, 30, 100_000])
def test_ranking_metrics_against_a_sort_also_with_ties(distinct_scores: int) -> None:
    scores, targets = torch.randint(distinct_scores, (150, 40)).float(), torch.randint(40, (150,))
    metrics = ranking_metrics(reference.target_rank(scores, targets))
    assert metrics == pytest.approx(brute_force(scores.tolist(), targets.tolist()), rel=1e-12)


def test_ranking_metrics_equal_the_reference() -> None:
    ranks = torch.randint(60, (500,))
    metrics = ranking_metrics(ranks)
    assert set(metrics) == NAMES
    for k in (5, 20):
        for name, function in (("hit", reference.hit_at), ("mrr", reference.mrr_at), ("ndcg", reference.ndcg_at)):
            assert metrics[f"{name}@{k}"] == pytest.approx(function(ranks, k), rel=1e-14)


def test_edges_of_the_cutoffs() -> None:
    assert ranking_metrics(torch.tensor([4]))["mrr@5"] == pytest.approx(1 / 5)
    assert ranking_metrics(torch.tensor([5]))["hit@5"] == 0.0
    assert ranking_metrics(torch.tensor([5]))["ndcg@20"] == pytest.approx(1 / math.log2(7))
    assert ranking_metrics(torch.tensor([19]))["hit@20"] == 1.0 and ranking_metrics(torch.tensor([20]))["mrr@20"] == 0.0


def test_metrics_of_a_large_rank_do_not_overflow() -> None:
    assert ranking_metrics(torch.tensor([2**40, 0])) == pytest.approx(dict.fromkeys(NAMES, 0.5))


def test_a_task_is_ranked_above_20_labels_and_else_has_its_accuracy() -> None:
    ranks = torch.tensor([0, 3, 0, 1])
    assert task_metrics(ranks, 20) == {"accuracy": 0.5, "hit@1": 0.5}
    assert set(task_metrics(ranks, 21)) == NAMES and task_metrics(ranks, 21)["hit@1"] == 0.5
    assert (headline(20), headline(21)) == ("accuracy", "mrr@5")


def test_selection_falls_back_to_accuracy_for_a_task_that_is_not_ranked() -> None:
    ranked, small = task_metrics(torch.tensor([0, 1]), 30), task_metrics(torch.tensor([0, 1]), 2)
    assert selection_value(ranked, "mrr@5") == 0.75 and selection_value(ranked) == 0.5
    assert selection_value(small, "mrr@5") == selection_value(small, "hit@1") == 0.5
    for metrics in (ranked, small):
        with pytest.raises(ConfigError, match="'mrr@7', expected one of hit@1, mrr@5"):
            selection_value(metrics, "mrr@7")


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (torch.tensor([0.0, 1.0]), r"torch.float32 \[2\], expected int64 \[N\]"),
        (torch.tensor([[0, 1]]), r"torch.int64 \[1, 2\], expected int64 \[N\]"),
        (torch.tensor([], dtype=torch.int64), r"\[0\], expected int64 \[N\] with N >= 1"),
        (torch.tensor([0, -1]), "got -1, expected ranks from 0"),
    ],
)
def test_bad_ranks_are_named(ranks: torch.Tensor, message: str) -> None:
    for function in (ranking_metrics, lambda r: task_metrics(r, 50)):
        with pytest.raises(ShapeError, match=message):
            function(ranks)


def test_a_rank_beyond_the_labels_is_refused() -> None:
    with pytest.raises(ShapeError, match="got 8, expected ranks below num_labels = 8"):
        task_metrics(torch.tensor([0, 8]), 8)


ROWS = [[0.5], [0.4, 0.8], [0.6, 0.2, 0.25]]


def test_result_matrix_is_lower_triangular() -> None:
    matrix = result_matrix(ROWS)
    assert matrix.shape == (3, 3) and matrix[1].tolist()[:2] == [0.4, 0.8]
    assert np.isnan(matrix[np.triu_indices(3, 1)]).all()
    with pytest.raises(ShapeError, match="got 1 values in row 1, expected 2"):
        result_matrix([[0.5], [0.4]])


def test_backward_transfer_compares_the_last_row_with_the_diagonal() -> None:
    assert backward_transfer(result_matrix(ROWS)).tolist() == pytest.approx([20.0, -75.0, 0.0])
    assert backward_transfer(result_matrix(ROWS[:1])).tolist() == [0.0]


def test_forward_transfer_compares_the_diagonal_with_single_models() -> None:
    transfer = forward_transfer(result_matrix(ROWS), [0.5, 0.5, float("nan")])
    assert transfer.tolist()[:2] == pytest.approx([0.0, 60.0]) and np.isnan(transfer[2])


def test_transfer_from_zero_is_not_a_number() -> None:
    """A change relative to 0 has no value, and must not become infinite or raise."""
    assert np.isnan(backward_transfer(result_matrix([[0.0], [0.3, 0.4]]))[0])
    assert np.isnan(forward_transfer(result_matrix([[0.3]]), [0.0])[0])


def test_bad_matrices_are_named() -> None:
    with pytest.raises(ShapeError, match=r"got \[2, 3\], expected \[M, M\]"):
        backward_transfer(np.zeros((2, 3)))
    with pytest.raises(ShapeError, match=r"got \[2\], expected \[3\]"):
        forward_transfer(result_matrix(ROWS), [0.1, 0.2])
