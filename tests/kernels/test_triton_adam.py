"""Adam's Triton kernels beside PyTorch's Adam, and lazy steps beside those that were not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from triton_here import require_triton

require_triton()

from teracon_fast.kernels import adam as kernels

LR, STEPS = 1e-2, 7


class State(NamedTuple):
    """A parameter and what belongs to it."""

    parameter: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    last: Tensor
    history: Tensor

    def copy(self) -> State:
        return State(*(tensor.clone() for tensor in self))

    def arrays(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.parameter, self.exp_avg, self.exp_avg_sq


def fresh(device: torch.device, rows: int, channels: int) -> State:
    start = torch.randn(rows, channels)
    start[::3] = 0  # where the parameter is the sum of its updates alone
    last, history = torch.full((rows,), -1, dtype=torch.int32), torch.full((STEPS, 2), torch.nan)
    return State(*(t.to(device) for t in (start, torch.zeros(rows, channels), torch.zeros(rows, channels), last, history)))


def numbers(step: int, beta1: float, beta2: float) -> tuple[float, float]:
    return LR / (1 - beta1**step), (1 - beta2**step) ** 0.5


def gradients(rows: int, channels: int, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and values: none, one, all the same, few often. The last fifth of the rows never has a gradient."""
    some = max(1, rows * 4 // 5)
    for count in (16, 0, 1, 8, 24, 6, 3)[:STEPS]:
        items = (torch.rand(count) ** 3 * some).long() if count != 8 else torch.full((count,), some - 1)
        scale = 10.0 ** torch.randint(-6, 3, (count, 1))
        yield items, (torch.randn(count, channels) * scale).to(dtype)


def by_torch(start: Tensor, steps: list[tuple[Tensor, Tensor]], dtype: torch.dtype, betas: tuple[float, float]) -> list[Tensor]:
    parameter = nn.Parameter(start.cpu().to(dtype))
    optimizer = torch.optim.Adam([parameter], lr=LR, betas=betas, foreach=False)
    for items, values in steps:
        parameter.grad = torch.zeros_like(parameter).index_add(0, items, values.to(dtype))
        optimizer.step()
    state = optimizer.state[parameter]
    return [parameter.detach(), state["exp_avg"], state["exp_avg_sq"]]


# Less than a tile of channels, and several; beta1 on both sides of a half.
@pytest.mark.parametrize(
    ("rows", "channels", "dtype", "betas"),
    [
        (1, 1, torch.float32, (0.9, 0.999)), (40, 20, torch.float32, (0.9, 0.999)), (40, 20, torch.bfloat16, (0.9, 0.999)),
        (40, 20, torch.float32, (0.3, 0.9)), (20, 300, torch.float32, (0.9, 0.99)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("lazy", [False, True])
def test_error_is_that_of_torchs_adam_in_float32(
    device: torch.device, rows: int, channels: int, dtype: torch.dtype, betas: tuple[float, float], lazy: bool
) -> None:
    state = fresh(device, rows, channels)
    start, steps = state.parameter.clone(), list(gradients(rows, channels, dtype))
    for step, (items, values) in enumerate(steps, 1):
        given, constants = (items.to(device), values.to(device)), (*numbers(step, *betas), *betas, 1e-8)
        if lazy:
            kernels.step(*state.arrays(), state.last, *given, state.history, step, *constants)
        else:
            kernels.whole_step(*state.arrays(), *given, *constants)
    if lazy:
        assert int(state.last.min()) < STEPS or rows == 1, "no row is behind, so nothing is tested"
        kernels.catch_up(*state.arrays(), state.last, None, state.history, STEPS, *betas, 1e-8)
    exact, naive = (by_torch(start, steps, kind, betas) for kind in (torch.float64, torch.float32))
    for got, simple, truth in zip(state.arrays(), naive, exact, strict=True):
        error, allowed = (got.cpu().double() - truth).norm(), (simple.double() - truth).norm()
        assert error <= 2 * allowed + 2e-7 * truth.norm() + 1e-12
    assert torch.equal(state.parameter[rows * 4 // 5 + 1 :], start[rows * 4 // 5 + 1 :]), "they have never had a gradient"


@pytest.mark.parametrize(
    ("channels", "betas"), [(20, (0.9, 0.999)), (20, (0.3, 0.9)), (20, (0.9, 0.0)), (300, (0.9, 0.999))]
)
def test_steps_that_are_taken_later_have_the_same_bits(
    device: torch.device, channels: int, betas: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_TOGETHER", 4)
    at_once = fresh(device, 40, channels)
    later = at_once.copy()
    for step, (items, values) in enumerate(gradients(40, channels), 1):
        given, constants = (items.to(device), values.to(device)), (*numbers(step, *betas), *betas, 1e-8)
        kernels.whole_step(*at_once.arrays(), *given, *constants)
        kernels.step(*later.arrays(), later.last, *given, later.history, step, *constants)
        if step in (3, 6):
            wanted = torch.tensor([5, 0, 39, 5, 7, 5, 1], device=device)  # repeated, and some never seen
            kernels.catch_up(*later.arrays(), later.last, wanted.int(), later.history, step, *betas, 1e-8)
            for mine, other in zip(later.arrays(), at_once.arrays(), strict=True):
                assert torch.equal(mine[wanted], other[wanted])
            assert not torch.equal(later.parameter, at_once.parameter), "only the rows that are asked for"
    kernels.catch_up(*later.arrays(), later.last, None, later.history, STEPS, *betas, 1e-8)
    for mine, other in zip(later.arrays(), at_once.arrays(), strict=True):
        assert torch.equal(mine, other)
    assert set(later.last.tolist()) == {-1, STEPS}
    assert torch.equal(later.history, torch.tensor([numbers(step, *betas) for step in range(1, STEPS + 1)], device=device))


@pytest.mark.parametrize("lazy", [False, True])
def test_repeats_are_added_up_in_the_order_of_occurrence(device: torch.device, lazy: bool) -> None:
    """With beta1 = 0 the first moment is the gradient. Runs end before, at and behind what is read at once."""
    lengths = [1, 2, 3, 0, kernels._TOGETHER, kernels._TOGETHER + 1, kernels._TOGETHER + 2, 2 * kernels._TOGETHER + 1, 0, 70]
    items = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    items = items[torch.randperm(len(items))]
    values = torch.randn(len(items), 20) * 10.0 ** torch.randint(-4, 5, (len(items), 1))
    expected = torch.zeros(len(lengths), 20)
    for item, value in zip(items, values, strict=True):
        expected[item] += value
    state = fresh(device, len(lengths), 20)
    given, constants = (items.to(device), values.to(device)), (*numbers(1, 0.0, 0.999), 0.0, 0.999, 1e-8)
    if lazy:
        kernels.step(*state.arrays(), state.last, *given, state.history, 1, *constants)
    else:
        kernels.whole_step(*state.arrays(), *given, *constants)
    assert torch.equal(state.exp_avg.cpu(), expected)


def test_rows_out_of_range_are_passed_over(device: torch.device) -> None:
    state = fresh(device, 10, 4)
    other, before = state.copy(), state.copy()
    items = torch.tensor([-1, 10, 3, 2**31 - 1, 2**32 + 5, -(2**40), 3], device=device)
    values, constants = torch.randn(7, 4, device=device), (*numbers(1, 0.9, 0.999), 0.9, 0.999, 1e-8)
    kernels.step(*state.arrays(), state.last, items, values, state.history, 1, *constants)
    kernels.whole_step(*other.arrays(), items, values, *constants)
    kernels.catch_up(*state.arrays(), state.last, items, state.history, 1, 0.9, 0.999, 1e-8)
    rest = torch.arange(10, device=device) != 3
    for mine, whole, old in zip(state.arrays(), other.arrays(), before.arrays(), strict=True):
        assert torch.equal(mine, whole) and torch.equal(mine[rest], old[rest]) and not torch.equal(mine[3], old[3])
    assert state.last.tolist() == [-1] * 3 + [1] + [-1] * 6


def test_values_of_any_layout(device: torch.device) -> None:
    start, items = fresh(device, 10, 6), torch.tensor([3, 1, 3, 7], device=device)
    wide = torch.randn(4, 12).to(device)
    constants = (*numbers(1, 0.9, 0.999), 0.9, 0.999, 1e-8)
    for values in (wide[:, ::2], wide[:, 3:9], wide[:, :4].t()[:, :1].expand(4, 6), torch.ones((), device=device).expand(4, 6)):
        ends = []
        for same in (values, values.contiguous()):
            state, whole = start.copy(), start.copy()
            kernels.step(*state.arrays(), state.last, items, same, state.history, 1, *constants)
            kernels.whole_step(*whole.arrays(), items, same, *constants)
            ends += [state, whole]
        assert all(torch.equal(end.parameter, ends[0].parameter) for end in ends)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_a_number_stays_where_it_is(device: torch.device) -> None:
    state = fresh(device, 40, 20)
    items, values = torch.tensor([3, 20, 3], device=device), torch.ones(3, 20, device=device)
    values[2, 4], values[1, 19] = torch.nan, torch.inf
    kernels.whole_step(*state.arrays(), items, values, *numbers(1, 0.9, 0.999), 0.9, 0.999, 1e-8)
    assert state.parameter.isnan().nonzero().tolist() == [[3, 4], [20, 19]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_without_eps_an_element_without_moments_is_no_number(device: torch.device) -> None:
    """0 / 0, as in PyTorch."""
    state = fresh(device, 20, 4)
    items, values = torch.tensor([3], device=device), torch.ones(1, 4, device=device)
    kernels.whole_step(*state.arrays(), items, values, *numbers(1, 0.9, 0.999), 0.9, 0.999, 0.0)
    assert state.parameter.isnan().any(1).logical_not().nonzero().tolist() == [[3]]
