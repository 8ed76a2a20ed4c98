"""Triton's ranks and best labels against a full stable sort."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_here import require_triton

require_triton()

from teracon_fast.kernels import linear_rank as kernels

Lists = list[list[int]]


def tied(device: torch.device, rows: int, labels: int) -> list[Tensor]:
    """A head of small whole numbers: logits are exact, and most of them equal others."""
    return [torch.randint(-1, 2, shape, device=device).float() for shape in ((rows, 3), (labels, 3), (labels,))]


def flat(device: torch.device, lists: Lists) -> tuple[Tensor, Tensor]:
    counts = torch.tensor([0, *(len(part) for part in lists)], device=device)
    numbers = [label for part in lists for label in part]
    return torch.tensor(numbers, dtype=torch.int64, device=device), counts.cumsum(0)


def sorted_in_full(values: list[Tensor], k: int, lists: Lists) -> tuple[Tensor, Tensor]:
    logits = F.linear(*values)
    for row, labels in enumerate(lists):
        logits[row, labels] = -torch.inf
    scores, labels = (part[:, :k] for part in logits.sort(dim=1, descending=True, stable=True))
    return scores, labels.masked_fill(scores.isneginf(), -1)


@pytest.mark.parametrize(("rows", "labels"), [(1, 1), (20, 33), (37, 150)])
def test_ranks_equal_a_full_stable_sort(device: torch.device, rows: int, labels: int) -> None:
    values = tied(device, rows, labels)
    targets, row_of = torch.randint(labels, (60,), device=device), torch.randint(rows, (60,), device=device)
    order = F.linear(*values).sort(dim=1, descending=True, stable=True).indices
    expected = (order[row_of] == targets[:, None]).nonzero()[:, 1]
    got = kernels.rank(*values, targets, row_of)
    assert got.dtype == torch.int64 and torch.equal(got, expected)
    assert torch.equal(kernels.rank(values[0].bfloat16(), *values[1:], targets, row_of), expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_targets_of_a_row_with_nan_have_the_rank_that_none_can_have(device: torch.device) -> None:
    values = tied(device, 20, 50)
    values[0][[3, 17]] = torch.nan
    row_of = torch.tensor([3, 0, 17, 19, 3], device=device)
    targets = torch.tensor([1, 2, 3, 4, 5], device=device)
    got = kernels.rank(*values, targets, row_of)
    assert got[[0, 2, 4]].tolist() == [50] * 3
    values[0] = values[0][[0, 19]]
    assert torch.equal(got[[1, 3]], kernels.rank(*values, targets[[1, 3]], torch.arange(2, device=device)))


def test_nothing_to_rank(device: torch.device) -> None:
    none = torch.empty(0, dtype=torch.int64, device=device).clone()
    for rows in (0, 5):
        values = tied(device, rows, 9)
        assert kernels.rank(*values, none, none).shape == (0,)
    scores, labels = kernels.topk(values[0][:0], *values[1:], 2, none, torch.zeros(1, dtype=torch.int64, device=device))
    assert scores.shape == labels.shape == (0, 2)


@pytest.mark.parametrize(("rows", "labels", "k"), [(1, 1, 1), (5, 30, 30), (20, 150, 20), (7, 100, 70)])
def test_best_labels_equal_a_full_stable_sort(device: torch.device, rows: int, labels: int, k: int) -> None:
    """With ties, and, beyond what one walk finds, in several walks."""
    values = tied(device, rows, labels)
    scores, best = kernels.topk(*values, k, *flat(device, [[]] * rows))
    expected = sorted_in_full(values, k, [])
    assert scores.dtype == torch.float32 and torch.equal(scores, expected[0])
    assert best.dtype == torch.int64 and torch.equal(best, expected[1])


def test_scores_are_those_of_the_head(device: torch.device) -> None:
    values = [torch.randn(shape, device=device) for shape in ((9, 21), (120, 21), (120,))]
    scores, best = kernels.topk(*values, 10, *flat(device, [[]] * 9))
    expected = F.linear(*(value.double() for value in values)).topk(10, 1)
    assert torch.equal(best, expected.indices)
    torch.testing.assert_close(scores.double(), expected.values, rtol=1e-5, atol=1e-5)


def test_excluded_labels_are_never_returned(device: torch.device) -> None:
    """Unsorted lists, repeated labels, several in one tile, all labels, all but one, none."""
    values = tied(device, 18, 100)
    lists: Lists = [torch.randint(100, (row * 4,)).tolist() for row in range(18)]
    lists[3], lists[4], lists[5] = list(range(99, -1, -1)), list(range(99)), []
    scores, best = kernels.topk(*values, 12, *flat(device, lists))
    expected = sorted_in_full(values, 12, lists)
    assert torch.equal(best, expected[1]) and torch.equal(scores, expected[0])
    assert best[3].tolist() == [-1] * 12 and best[4].tolist() == [99] + [-1] * 11
    values[0], lists = values[0][:9], lists[:9]
    scores, best = kernels.topk(*values, 40, *flat(device, lists))
    expected = sorted_in_full(values, 40, lists)
    assert torch.equal(best, expected[1]) and torch.equal(scores, expected[0])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_scores_that_are_not_finite_and_zeros_of_both_signs(device: torch.device) -> None:
    hidden, weight = torch.zeros(1, 1, device=device), torch.zeros(7, 1, device=device)
    bias = torch.tensor([0.0, -torch.inf, torch.inf, -0.0, torch.nan, -1.0, 0.0], device=device)
    scores, best = kernels.topk(hidden, weight, bias, 7, *flat(device, [[]]))
    assert best[0].tolist() == [4, 2, 0, 3, 6, 5, -1]
    assert scores[0].tolist()[1:] == [torch.inf, 0.0, 0.0, 0.0, -1.0, -torch.inf] and scores[0, 0].isnan()
