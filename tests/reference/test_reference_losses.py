"""Cross-entropy, retention loss, rho and annealing against scalar arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from teracon_fast.errors import ConfigError, ShapeError
from teracon_fast.reference import annealed_scale, cross_entropy, retention_loss, rho

F64 = torch.float64


def test_cross_entropy_counts_every_row_also_pad_targets() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0], [0.2, 0.1, 0.0]], dtype=F64)
    targets = [0, 2, 1]
    terms = [math.log(sum(math.exp(v) for v in row)) - row[t] for row, t in zip(logits.tolist(), targets, strict=True)]
    assert cross_entropy(logits, torch.tensor(targets)).item() == pytest.approx(sum(terms) / 3, rel=1e-14)


def test_retention_loss_weighs_the_mean_squares_by_rho() -> None:
    student = [torch.randn(3, 5, dtype=F64), torch.randn(2, 4, dtype=F64)]
    teacher = [torch.randn(3, 5, dtype=F64), torch.randn(2, 4, dtype=F64)]
    squares = [((a - b) ** 2).sum().item() / a.numel() for a, b in zip(student, teacher, strict=True)]
    got = retention_loss(student, teacher, [0.3, 0.1]).item()
    assert got == pytest.approx(0.75 * squares[0] + 0.25 * squares[1], rel=1e-13)


def test_retention_loss_needs_one_ratio_per_past_task() -> None:
    logits = [torch.zeros(2, 3)]
    with pytest.raises(ShapeError, match="1 student logits, 1 teacher logits and 2 ratios"):
        retention_loss(logits, logits, [0.1, 0.2])
    with pytest.raises(ShapeError, match="at least one"):
        retention_loss([], [], [])


def test_rho_is_equation_15() -> None:
    teacher, current = torch.rand(2, 7, dtype=F64), torch.rand(2, 7, dtype=F64)
    similarity = []
    for a, b in zip(teacher.tolist(), current.tolist(), strict=True):
        dot = sum(p * q for p, q in zip(a, b, strict=True))
        cosine = dot / (math.hypot(*a) * math.hypot(*b))
        similarity.append(1 / (1 + math.exp(-4.5 * cosine)))
    assert rho(teacher, current, c=4.5) == pytest.approx(1 - sum(similarity) / 2, rel=1e-12)


def test_rho_runs_from_equal_to_orthogonal_masks() -> None:
    mask = torch.rand(16, 8, dtype=F64) + 0.1
    assert rho(mask, 3 * mask) == pytest.approx(1 - 1 / (1 + math.exp(-6)), rel=1e-12)
    left, right = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert rho(left, right) == 0.5


def test_rho_takes_no_gradient() -> None:
    mask = torch.rand(4, 8, requires_grad=True)
    assert isinstance(rho(mask, mask), float) and mask.grad is None


@pytest.mark.parametrize("num_batches", [1.0, 4.0, 10.4])
def test_annealing_official_reaches_s_max_where_the_next_epoch_begins(num_batches: float) -> None:
    assert annealed_scale(0, num_batches, 50.0) == 1 / 50
    end = annealed_scale(1, 1.0, 50.0)  # b = N/B, one past the last whole batch
    assert end == pytest.approx(50.0, rel=1e-15)
    assert all(annealed_scale(b, num_batches, 50.0) < 50 for b in range(math.ceil(num_batches)))


def test_annealing_official_is_linear_in_the_unrounded_number_of_batches() -> None:
    assert annealed_scale(3, 10.4, 20.0) == pytest.approx(1 / 20 + (20 - 1 / 20) * 3 / 10.4, rel=1e-15)


@pytest.mark.parametrize(("num_batches", "last"), [(5.0, 4), (4.2, 4), (2.0, 1)])
def test_annealing_paper_ends_at_s_max(num_batches: float, last: int) -> None:
    assert annealed_scale(0, num_batches, 50.0, "paper") == 1 / 50
    assert annealed_scale(last, num_batches, 50.0, "paper") == pytest.approx(50.0, rel=1e-15)
    halfway = annealed_scale(1, 3.0, 50.0, "paper")
    assert halfway == pytest.approx((50 + 1 / 50) / 2, rel=1e-15)


def test_annealing_of_an_epoch_of_one_batch() -> None:
    assert annealed_scale(0, 0.4, 50.0, "paper") == annealed_scale(0, 0.4, 50.0) == 1 / 50


def test_annealing_refuses_an_unknown_parity() -> None:
    with pytest.raises(ConfigError, match="'even', expected official or paper"):
        annealed_scale(0, 4.0, 50.0, "even")
