"""Masks of all tasks at once equal the equations task by task."""

from __future__ import annotations

import pytest
import torch

from teracon_fast.errors import ConfigError
from teracon_fast.model.masks import annealed_scale
from teracon_fast.ops.task_masks import check_variant, relation_width
from teracon_fast.ops.task_masks import torch as masks
from teracon_fast.reference import losses
from teracon_fast.reference.masks import relation_mask


@pytest.mark.parametrize("variant", ["relation", "positive_only"])
@pytest.mark.parametrize("num_tasks", [1, 2, 5])
@pytest.mark.parametrize("s", [0.02, 3.0, 50.0])
def test_relation_masks_equal_the_equation(variant: str, num_tasks: int, s: float) -> None:
    torch.manual_seed(0)
    width = relation_width(num_tasks, variant)  # type: ignore[arg-type]
    e = torch.randn(4, num_tasks, 7, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, num_tasks, width, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, num_tasks, dtype=torch.float64, requires_grad=True)
    got = masks.relation_masks(e, w, b, s, variant)  # type: ignore[arg-type]
    expected = torch.stack(
        [torch.stack([relation_mask(e[k], w[k, t], b[k, t], t, s, variant) for t in range(num_tasks)]) for k in range(4)]
    )
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(expected)
    for a, c in zip(
        torch.autograd.grad((got * weight).sum(), (e, w, b)),
        torch.autograd.grad((expected * weight).sum(), (e, w, b)),
        strict=True,
    ):
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-10)
    chosen = masks.relation_masks(e, w[:, [0]], b[:, [0]], s, variant, (0,))  # type: ignore[arg-type]
    torch.testing.assert_close(chosen, expected[:, [0]], rtol=1e-10, atol=1e-12)


def test_rho_equals_the_equation() -> None:
    teacher, current = torch.rand(6, 3, 5), torch.rand(6, 5)
    expected = [losses.rho(teacher[:, j], current, 6.0) for j in range(3)]
    assert masks.rho(teacher, current, 6.0).tolist() == pytest.approx(expected, rel=1e-12)
    assert masks.rho(current[:, None], current).item() == pytest.approx(1 - torch.sigmoid(torch.tensor(6.0)).item(), abs=1e-6)


def test_annealing_ends() -> None:
    assert annealed_scale(0, 12.5) == pytest.approx(1 / 50)
    assert annealed_scale(12, 12.5) == pytest.approx((50 - 0.02) * 12 / 12.5 + 0.02)
    assert annealed_scale(0, 10, parity="paper") == pytest.approx(1 / 50)
    assert annealed_scale(9, 10, parity="paper") == pytest.approx(50)
    assert annealed_scale(9, 9.5, parity="paper") == pytest.approx(50)
    assert annealed_scale(0, 1, parity="paper") == pytest.approx(1 / 50)


def test_unknown_variant_is_refused() -> None:
    with pytest.raises(ConfigError, match="'negative', expected one of"):
        check_variant("negative")


def test_masks_of_some_tasks_and_their_gradient() -> None:
    everything = torch.randn(4, 3, 5, requires_grad=True)
    assert masks.of_tasks(everything, [0, 1, 2]) is everything
    assert masks.of_tasks(everything, []).shape == (4, 0, 5)
    for tasks in ([2, 0, 1], [1], [2, 2, 0, 2]):
        weight = torch.randn(4, len(tasks), 5)
        got, expected = masks.of_tasks(everything, tasks), everything[:, tasks]
        assert torch.equal(got, expected)
        pairs = [torch.autograd.grad((one * weight).sum(), everything)[0] for one in (got, expected)]
        assert torch.equal(*pairs)
