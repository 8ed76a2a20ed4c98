"""Retention loss and ranking of linear heads."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from teracon_fast import ops
from teracon_fast.errors import ShapeError


def head(labels: int = 11, channels: int = 4, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(labels, channels, dtype=dtype, requires_grad=True), torch.randn(labels, dtype=dtype, requires_grad=True)


def test_retention_weighs_tasks_by_rho_and_spares_the_teacher() -> None:
    torch.manual_seed(0)
    student, teacher = [head(5), head(7)], [head(5), head(7)]
    hs = [torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (3, 2)]
    ht = [torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (3, 2)]
    rho = [0.3, 0.1]
    loss = ops.retention_mse(hs, student, ht, teacher, rho)
    parts = [F.mse_loss(F.linear(a, *sa), F.linear(b, *sb)) for a, sa, b, sb in zip(hs, student, ht, teacher, strict=True)]
    torch.testing.assert_close(loss, 0.75 * parts[0] + 0.25 * parts[1], rtol=1e-6, atol=0)
    loss.backward()
    assert all(t.grad is None for t in (*ht, *teacher[0], *teacher[1]))
    assert all(t.grad is not None for t in (*hs, *student[0], *student[1]))


def test_retention_refuses_what_does_not_fit() -> None:
    one = torch.randn(2, 4)
    h = tuple(t.float().detach() for t in head())
    with pytest.raises(ShapeError, match=r"\[2, 4\] and teacher rows \[1, 4\]"):
        ops.retention_mse([one], [h], [one[:1]], [h], [0.5])
    with pytest.raises(ShapeError, match="at least one row"):
        ops.retention_mse([one[:0]], [h], [one[:0]], [h], [0.5])
    with pytest.raises(ShapeError, match=r"\[1, 1, 1, 1, 2\] past tasks"):
        ops.retention_mse([one], [h], [one], [h], [0.5, 0.5])
    with pytest.raises(ShapeError, match="past tasks"):
        ops.retention_mse([], [], [], [], [])


@pytest.mark.parametrize("block_bytes", [1, 200, 1 << 20])
def test_rank_and_topk_equal_a_full_stable_sort_with_many_ties(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[ops.linear_rank.__module__], "_BLOCK_BYTES", block_bytes)
    torch.manual_seed(0)
    hidden = torch.randint(-1, 2, (40, 3)).float()
    weight, bias = torch.randint(-1, 2, (12, 3)).float(), torch.zeros(12)
    targets = torch.randint(0, 12, (40,))
    order = F.linear(hidden, weight, bias).sort(dim=1, descending=True, stable=True).indices
    expected = (order == targets[:, None]).nonzero()[:, 1]
    assert torch.equal(ops.linear_rank(hidden, weight, bias, targets), expected)
    for k in (1, 5, 12):
        scores, labels = ops.linear_topk(hidden, weight, bias, k)
        assert torch.equal(labels, order[:, :k])
        assert torch.equal(scores, F.linear(hidden, weight, bias).gather(1, order[:, :k]))


def test_topk_leaves_out_excluded_labels() -> None:
    hidden = torch.ones(2, 1)
    weight, bias = torch.arange(4.0)[:, None], torch.zeros(4)
    scores, labels = ops.linear_topk(hidden, weight, bias, 3, [torch.tensor([3]), torch.tensor([0, 1, 3])])
    assert labels.tolist() == [[2, 1, 0], [2, -1, -1]]
    assert scores[1, 1:].isneginf().all()


def test_heads_refuse_what_does_not_fit() -> None:
    weight, bias = (t.float() for t in head())
    hidden = torch.randn(2, 4)
    with pytest.raises(ShapeError, match="targets are"):
        ops.linear_rank(hidden, weight, bias, torch.zeros(3).long())
    with pytest.raises(ShapeError, match="k is 12, expected 1..11"):
        ops.linear_topk(hidden, weight, bias, 12)
    with pytest.raises(ShapeError, match="exclude has 1 rows"):
        ops.linear_topk(hidden, weight, bias, 2, [torch.tensor([1])])
