"""Triton's masked convolution against plain PyTorch in float64: output, every gradient, tables, edges."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton_here import require_triton

from teracon_fast import ops, packing
from teracon_fast.ops.masked_conv import torch as plain
from teracon_fast.ops.masked_conv.api import Backward, Inputs, Parameters
from teracon_fast.ops.masked_conv.api import Tables as AllTables
from teracon_fast.ops.registration import flat
from teracon_fast.packing import ResidualTable, Streams, TapTable

require_triton()

from teracon_fast.kernels import masked_conv, masked_conv_backward

Tables = tuple[TapTable, ResidualTable]
EPS = 1e-8


def tables(
    device: torch.device, lengths: list[int], requests: int = 2, length: int = 12, kernel_size: int = 3, layer: int = 1,
    every: bool = True, drop_last: int = 1,
) -> Tables:  # fmt: skip
    """Tables of ragged users: all of them in the first request, the first two in the others, without their last items."""
    users = np.arange(len(lengths))
    streams = [Streams(users), *(Streams(users[:2], drop_last) for _ in range(requests - 1))]
    packed = ops.pack(np.array(lengths), streams, packing.geometry(length, (1, 2), kernel_size, every))
    residual = packed.residuals[layer // 2]
    return packed.convolutions[layer].to(device), ResidualTable(*(table.to(device) for table in residual))


def inputs(
    device: torch.device, table: TapTable, back: ResidualTable, f_in: int, f_out: int, dtype: torch.dtype = torch.float32,
    weights: torch.dtype = torch.float32,
) -> list[Tensor]:  # fmt: skip
    """x, weight, bias, ln_weight, ln_bias, mask, residual, grad. One mask is negative: the contract has them so."""
    requests = len(table.rows_per_request)
    shapes = [(table.rows_in, f_in), (f_out, f_in, table.taps.shape[1]), (f_out,), (f_out,), (f_out,), (requests, f_out)]
    shapes += [(back.readers.shape[0], f_out), (table.taps.shape[0], f_out)]
    kinds = [dtype, *[weights] * 5, dtype, dtype]
    values = [torch.randn(shape).to(device, kind) for shape, kind in zip(shapes, kinds, strict=True)]
    values[3].add_(1.0)
    return values


def by_kernels(
    values: list[Tensor], table: TapTable, back: ResidualTable, residual: bool = True, need_input: bool = True,
    need_weight: bool = True, addend: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """The output, and gradients of x, weight, bias, ln_weight, ln_bias, mask, residual, addend."""
    x, weight, bias, ln_weight, ln_bias, mask, added, grad = values
    added_rows = (added, back.rows) if residual else (None, None)
    out, conv, mean, rstd = masked_conv.forward(
        x, weight, bias, ln_weight, ln_bias, mask, table.taps, table.row_ends, *added_rows, EPS, True,
        addend=addend,
    )
    gradients = masked_conv_backward.backward(
        grad, x, weight, ln_weight, ln_bias, mask, table.taps, table.readers, table.bag_rows, table.bag_offsets, table.row_ends,
        back.readers if residual else None, conv, mean, rstd, need_input, "ieee", need_weight, addend is not None,
    )  # fmt: skip
    return [out, *gradients]


def by_torch(
    values: list[Tensor], table: TapTable, back: ResidualTable, dtype: torch.dtype, residual: bool = True,
    need_input: bool = True, need_weight: bool = True, addend: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """The same by the `torch` backend in another dtype."""
    x, *parameters, added, grad = (value.to(dtype) for value in values)
    tables = AllTables(*table.tensors, list(table.rows_per_request), *back)
    addend = None if addend is None else addend.to(dtype)
    inputs = Inputs(x, Parameters(*parameters), tables, added if residual else None, addend, EPS, "torch", "auto", True)
    out, kept = plain.forward(inputs)
    needs = need_input, need_weight, residual, addend is not None
    return [out, *flat(plain.backward(Backward(grad, inputs, kept, *needs)))]


def assert_as_exact(values: list[Tensor], table: TapTable, back: ResidualTable, got: list[Tensor], **options: Any) -> None:
    """err(kernels, exact) <= 2 err(torch backend, exact); exact is float64 on the same rounded inputs."""
    dtype = values[0].dtype
    rounded = [value.to(dtype) if index == 1 else value for index, value in enumerate(values)]
    exact = by_torch(rounded, table, back, torch.float64, **options)
    by_naive = by_torch(values, table, back, dtype, **options)
    for value, simple, truth in zip(got, by_naive, exact, strict=True):
        assert value.shape == truth.shape
        error, allowed = (value.double() - truth).norm(), (simple.double() - truth).norm()
        assert error <= 2 * allowed + 1e-6 * truth.norm() + 1e-9


# Channels below a tile, several steps, several pieces of the epilogue, several tiles of the weight's gradient, unequal ones.
@pytest.mark.parametrize(
    ("channels", "lengths", "options"),
    [
        ((7, 7), [0, 4, 12, 9, 1], {}),
        ((40, 40), [0, 4, 12, 12, 7, 1, 3, 12], {"requests": 3}),
        ((20, 70), [5, 12], {"kernel_size": 2, "every": False, "layer": 3}),
        ((70, 7), [0, 0, 0], {"requests": 3, "layer": 2}),
        ((16, 16), [12], {"requests": 1, "layer": 3, "every": False}),
    ],
)
def test_error_is_that_of_the_same_arithmetic_in_the_same_dtype(
    device: torch.device, channels: tuple[int, int], lengths: list[int], options: dict[str, Any]
) -> None:
    table, back = tables(device, lengths, **options)
    values = inputs(device, table, back, *channels)
    assert_as_exact(values, table, back, by_kernels(values, table, back))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [7, 40])
def test_an_addend_beside_a_frozen_weight(device: torch.device, channels: int, dtype: torch.dtype) -> None:
    table, back = tables(device, [0, 4, 12, 12, 7, 1])
    values = inputs(device, table, back, channels, channels, dtype)
    addend = torch.randn(table.taps.shape[0], channels).to(device, dtype)
    options: dict[str, Any] = {"need_weight": False, "addend": addend}
    got = by_kernels(values, table, back, **options)
    assert got[2].numel() == 0 and got[8].shape == addend.shape
    assert_as_exact(values, table, back, got, **options)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_bfloat16_rounds_weights_where_they_are_used(device: torch.device, weights: torch.dtype) -> None:
    table, back = tables(device, [0, 4, 12, 12, 7, 1])
    values = inputs(device, table, back, 40, 40, torch.bfloat16, weights)
    got = by_kernels(values, table, back)
    assert [tensor.dtype for tensor in got] == [torch.bfloat16, torch.bfloat16, *[weights] * 5, torch.bfloat16, torch.bfloat16]
    assert_as_exact(values, table, back, got)


def test_without_residual_and_without_the_inputs_gradient(device: torch.device) -> None:
    table, back = tables(device, [3, 12, 8])
    values = inputs(device, table, back, 7, 7)
    got = by_kernels(values, table, back, residual=False, need_input=False)
    assert got[1].shape == got[7].shape == (0,)
    assert_as_exact(values, table, back, got, residual=False, need_input=False)
    for one, other in zip(got[2:7], by_kernels(values, table, back)[2:7], strict=True):
        assert torch.equal(one, other)


def test_nothing_is_saved_unless_asked_for(device: torch.device) -> None:
    table, back = tables(device, [3, 12, 8])
    values = inputs(device, table, back, 7, 7)
    arguments = (*values[:6], table.taps, table.row_ends, None, None, EPS)
    out, *none = masked_conv.forward(*arguments, False)
    assert [tensor.shape for tensor in none] == [(0, 7), (0, 1), (0, 1)]
    again, conv, mean, rstd = masked_conv.forward(*arguments, True)
    assert torch.equal(out, again)
    torch.testing.assert_close(mean, conv.mean(1, keepdim=True), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rstd, (conv.var(1, correction=0, keepdim=True) + EPS).rsqrt(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_one(device: torch.device, rows: int) -> None:
    table, back = tables(device, [3, 12])
    values = inputs(device, table, back, 7, 7)
    whole = torch.full_like(table.readers, -1)
    whole[table.taps[0, 2].item(), 2] = rows - 1
    table = replace(
        table, taps=table.taps[:rows] * torch.tensor([0, 0, 1], device=device, dtype=torch.int32)
        - torch.tensor([1, 1, 0], device=device, dtype=torch.int32), readers=whole, bag_rows=table.bag_rows[:0],
        bag_offsets=table.bag_offsets[:1], rows_per_request=(0, rows), row_ends=torch.tensor([0, rows], device=device).int(),
    )  # fmt: skip
    back = ResidualTable(back.rows[:rows], torch.full_like(back.readers, -1))
    values[7] = values[7][:rows]
    got = by_kernels(values, table, back)
    assert got[0].shape == (rows, 7)
    assert_as_exact(values, table, back, got)
    if not rows:
        assert all(not gradient.any() for gradient in got[1:])


def test_more_requests_than_are_looked_at_at_once_and_empty_ones(device: torch.device) -> None:
    """Every row has the mask of its own request, and every mask the gradient of its own rows."""
    counts = [3, 0, 17, 1, 0, 0, 40, 16] + [1] * 20
    rows = sum(counts)
    taps = torch.arange(rows, dtype=torch.int32, device=device)[:, None].expand(rows, 2).contiguous()
    ends = torch.tensor(counts, device=device).cumsum(0).int()
    none = torch.zeros(0, dtype=torch.int32, device=device)
    table = TapTable(taps, taps, none, torch.zeros(1, dtype=torch.int32, device=device), tuple(counts), ends, rows)
    back = ResidualTable(taps[:, 0].contiguous(), taps[:, 0].contiguous())
    values = inputs(device, table, back, 5, 5)
    assert_as_exact(values, table, back, by_kernels(values, table, back))


def test_padding_rows_are_neither_read_nor_counted(device: torch.device) -> None:
    """Rows behind the last request's end, whose memory holds anything."""
    table, back = tables(device, [3, 12, 8, 0])
    values = inputs(device, table, back, 7, 7)
    expected = by_kernels(values, table, back)
    rows, more = table.taps.shape[0], 37
    bags = table.readers >= rows
    assert bags.any()

    def longer(tensor: Tensor, fill: float) -> Tensor:
        return torch.cat([tensor, tensor.new_full((more, *tensor.shape[1:]), fill)])

    table = replace(table, taps=longer(table.taps, -1), readers=torch.where(bags, table.readers + more, table.readers))
    back = ResidualTable(longer(back.rows, -1), back.readers)
    values[7] = longer(values[7], torch.nan)
    got = by_kernels(values, table, back)
    assert torch.equal(got[0][:rows], expected[0]) and not got[0][rows:].any()
    for one, other in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_tables_that_name_no_row_read_zeros(device: torch.device) -> None:
    table, back = tables(device, [3, 12, 8, 0])
    values = inputs(device, table, back, 7, 7)
    taps, readers, rows = table.taps.clone(), table.readers.clone(), back.rows.clone()
    taps[::5, 1], readers[::3, 0], rows[::4] = -1, -1, -1
    clear = by_kernels(values, replace(table, taps=taps, readers=readers), back._replace(rows=rows))
    taps[::5, 1], readers[::3, 0], rows[::4] = 2**30, 2**30, -(2**30)
    broken = by_kernels(values, replace(table, taps=taps, readers=readers), back._replace(rows=rows))
    assert all(torch.equal(one, other) for one, other in zip(clear, broken, strict=True))


def test_layouts_that_are_not_contiguous_give_the_same_bits(device: torch.device) -> None:
    table, back = tables(device, [3, 12, 8])
    values = inputs(device, table, back, 20, 20)
    values[7] = torch.ones_like(values[7])
    expected = by_kernels(values, table, back)
    strided = [torch.stack([value, value * torch.nan], -1)[..., 0] for value in values]
    strided[0] = values[0].t().contiguous().t()
    strided[7] = torch.ones((), device=device).expand(values[7].shape)  # what .sum() sends back
    assert not any(value.is_contiguous() for value in strided)
    for one, other in zip(by_kernels(strided, table, back), expected, strict=True):
        assert torch.equal(one, other)


def test_same_bits_from_run_to_run(device: torch.device) -> None:
    table, back = tables(device, [0, 4, 12, 12, 7, 1] * 3)
    values = inputs(device, table, back, 24, 24)
    first, second = by_kernels(values, table, back), by_kernels(values, table, back)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_a_number_stays_in_the_rows_that_read_it(device: torch.device) -> None:
    table, back = tables(device, [12, 12], layer=0)
    values = inputs(device, table, back, 7, 7)
    clean = by_kernels(values, table, back)
    values[0][3] = torch.nan
    got = by_kernels(values, table, back)
    reached = (table.taps == 3).any(1)
    assert reached.any() and not reached.all()
    assert got[0][reached].isnan().all() and torch.equal(got[0][~reached], clean[0][~reached])
    touched = torch.cat([reached, reached.new_zeros(1)])[table.readers.long().clamp(-1, len(reached))].any(1)
    assert got[1].isnan().all(1)[touched].all()
    beside = ~touched & ~(table.readers >= len(reached)).any(1)
    assert torch.equal(got[1][beside], clean[1][beside])
    # The gradient of the other request's mask has none of it; nor has that of the residual.
    of_requests = torch.tensor([bool(part.any()) for part in reached.split(list(table.rows_per_request))])
    assert torch.equal(got[6].isnan().all(1).cpu(), of_requests) and torch.equal(got[7], clean[7])
