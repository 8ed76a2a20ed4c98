"""Triton's distance between two heads' logits against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_here import require_triton

require_triton()

from teracon_fast.kernels import retention_mse as kernels

COEFFICIENT = 0.37


def coefficient(device: torch.device) -> Tensor:
    return torch.tensor(COEFFICIENT, device=device)


def heads(device: torch.device, rows: int, labels: int, channels: int, dtype: torch.dtype, weights: torch.dtype) -> list[Tensor]:
    one = [(torch.randn(rows, channels), dtype), (torch.randn(labels, channels), weights), (torch.randn(labels), weights)]
    return [tensor.to(device, kind) for tensor, kind in one] + [torch.randn_like(t).to(device, kind) for t, kind in one]


def naive(dtype: torch.dtype, values: list[Tensor]) -> list[Tensor]:
    student = [value.to(dtype).requires_grad_() for value in values[:3]]
    teacher = [value.to(dtype) for value in values[3:]]
    loss = (F.linear(*student) - F.linear(*teacher)).square().sum() * COEFFICIENT
    return [loss.detach(), *torch.autograd.grad(loss, student)]


# One row, less than a tile of rows, several tiles, which add to d(weight) in turn; several pieces and tiles of channels.
@pytest.mark.parametrize(("rows", "labels", "channels"), [(1, 1, 1), (2, 33, 7), (17, 50, 40), (40, 230, 70)])
@pytest.mark.parametrize(
    ("dtype", "weights"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_error_is_that_of_the_same_arithmetic_in_the_same_dtype(
    device: torch.device, rows: int, labels: int, channels: int, dtype: torch.dtype, weights: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(kernels, "_PIECE", 16)
    values = heads(device, rows, labels, channels, dtype, weights)
    got = kernels.forward_backward(*values, coefficient(device), True)
    assert [tensor.dtype for tensor in got] == [torch.float32, dtype, weights, weights]
    rounded = [value.to(dtype) if value.dim() == 2 else value for value in values]
    exact, by_naive = naive(torch.float64, rounded), naive(dtype, rounded)
    for value, simple, truth in zip(got, by_naive, exact, strict=True):
        error, allowed = (value.double() - truth).norm(), (simple.double() - truth).norm()
        assert error <= 2 * allowed + 5e-7 * truth.norm() + 1e-9
    loss, *none = kernels.forward_backward(*values, coefficient(device), False)
    assert torch.equal(loss, got[0]) and [tuple(tensor.shape) for tensor in none] == [(0,)] * 3


def test_equal_students_and_teachers_differ_by_nothing(device: torch.device) -> None:
    student = heads(device, 20, 50, 40, torch.float32, torch.float32)[:3]
    for result in kernels.forward_backward(*student, *student, coefficient(device), True):
        assert torch.equal(result, torch.zeros_like(result))


def test_layouts_that_are_not_contiguous_give_the_same_bits(device: torch.device) -> None:
    values = heads(device, 20, 50, 12, torch.float32, torch.float32)
    strided = [torch.stack([value, value * torch.nan], -1)[..., 0] for value in values]
    assert not any(tensor.is_contiguous() for tensor in strided)
    one, other = (kernels.forward_backward(*some, coefficient(device), True) for some in (values, strided))
    assert all(map(torch.equal, one, other))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_a_number_reaches_the_loss_and_its_own_label_only(device: torch.device) -> None:
    values = heads(device, 3, 50, 5, torch.float32, torch.float32)
    values[2][40] = torch.nan
    loss, d_hidden, d_weight, d_bias = kernels.forward_backward(*values, coefficient(device), True)
    assert loss.isnan() and d_hidden.isnan().all()
    assert d_weight.isnan().any(1).nonzero().flatten().tolist() == [40] == d_bias.isnan().nonzero().flatten().tolist()


@pytest.mark.parametrize("count", [5, 30])
def test_rows_from_a_number_on_the_device_are_padding(device: torch.device, count: int) -> None:
    values = heads(device, count, 50, 40, torch.float32, torch.float32)
    expected = kernels.forward_backward(*values, coefficient(device), True)
    garbage = torch.full((19, 40), torch.nan, device=device)
    padded = [torch.cat([value, garbage]) if i % 3 == 0 else value for i, value in enumerate(values)]
    valid = torch.tensor(count, dtype=torch.int32, device=device)
    loss, d_hidden, *rest = kernels.forward_backward(*padded, coefficient(device), True, valid)
    assert not d_hidden[count:].any()
    for got, wanted in zip((loss, d_hidden[:count], *rest), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
