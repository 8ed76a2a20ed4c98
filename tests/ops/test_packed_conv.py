"""The convolution without normalization by itself: exactness, gradients, autocast, inputs that must be refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from teracon_fast import ops, packing
from teracon_fast.errors import ShapeError
from teracon_fast.ops import rows
from teracon_fast.packing import ResidualTable, Streams, TapTable


def tables(lengths: list[int], layer: int = 1, every: bool = False) -> tuple[TapTable, ResidualTable]:
    geometry = packing.geometry(9, (1, 2), 3, every)
    users = np.arange(len(lengths))
    packed = ops.pack(np.array(lengths), [Streams(users), Streams(users[:2])], geometry)
    return packed.convolutions[layer], packed.residuals[layer // 2]


def inputs(table: TapTable, back: ResidualTable, f_in: int, f_out: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = [(table.rows_in, f_in), (f_out, f_in, 3), (f_out,), (back.readers.shape[0], f_out)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def naive(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, table: TapTable, back: ResidualTable
) -> Tensor:
    """The formula in the module's docstring, by plain indexing."""
    padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
    return bias + torch.einsum("rki,oik->ro", padded[table.taps.long()], weight) + residual[back.rows.long()]


def run(values: list[Tensor], table: TapTable, back: ResidualTable) -> Tensor:
    return ops.packed_conv(*values[:3], table, residual=values[3], residual_table=back)


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("layer", [1, 3])
def test_gradcheck(every: bool, layer: int) -> None:
    table, back = tables([0, 3, 9], layer, every)
    torch.autograd.gradcheck(lambda *v: run(list(v), table, back), inputs(table, back, 3, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_that_of_the_same_arithmetic_in_the_same_dtype(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """err(op, exact) <= 2 err(naive, exact), outputs and every gradient, in several chunks of rows."""
    monkeypatch.setattr(rows, "_CHUNK_BYTES", 1)
    table, back = tables([0, 4, 9, 9, 7, 1] * 20, every=True)
    assert table.taps.shape[0] > 128
    values = inputs(table, back, 7, 5, dtype)
    grad = torch.randn(table.taps.shape[0], 5, dtype=dtype)

    def results(way: str, wanted: torch.dtype) -> list[Tensor]:
        own = [v.detach().to(wanted).requires_grad_() for v in values]
        out = run(own, table, back) if way == "op" else naive(*own, table, back)
        out.backward(grad.to(wanted))
        return [out.detach(), *(v.grad for v in own if v.grad is not None)]

    exact = results("naive", torch.float64)
    for got, plain, true in zip(results("op", dtype), results("naive", dtype), exact, strict=True):
        assert (got.double() - true).norm() <= 2 * (plain.double() - true).norm() + 1e-6 * true.norm()


def test_under_autocast_rows_take_its_dtype_and_parameters_get_gradients_of_their_own() -> None:
    table, back = tables([4, 9])
    values = inputs(table, back, 4, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(values, table, back)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert [v.grad.dtype for v in values if v.grad is not None] == [torch.float32] * 4


def test_without_residual() -> None:
    table, back = tables([4, 9])
    values = inputs(table, back, 4, 4)
    got = ops.packed_conv(*values[:3], table)
    torch.testing.assert_close(got, naive(*values[:3], torch.zeros_like(values[3]), table, back))


def test_inputs_that_do_not_fit_are_refused() -> None:
    table, back = tables([4, 9])
    x, weight, bias, residual = inputs(table, back, 4, 4)
    with pytest.raises(ShapeError, match=r"x is torch.float64 \[\d+, 4\]"):
        ops.packed_conv(x[1:], weight, bias, table)
    with pytest.raises(ShapeError, match=r"weight is \[4, 4\], expected \[f_out, f_in, K\]"):
        ops.packed_conv(x, weight[..., 0], bias, table)
    with pytest.raises(ShapeError, match="bias is torch.float32"):
        ops.packed_conv(x, weight, bias.float(), table)
    with pytest.raises(ShapeError, match="go together"):
        ops.packed_conv(x, weight, bias, table, residual=residual)
    with pytest.raises(ShapeError, match="residual is"):
        ops.packed_conv(x, weight, bias, table, residual=residual[1:], residual_table=back)
    with pytest.raises(ShapeError, match=r"rows_per_request sums to 20, expected 19 rows"):
        ops.packed_conv(x, weight, bias, replace(table, taps=table.taps[1:]))
