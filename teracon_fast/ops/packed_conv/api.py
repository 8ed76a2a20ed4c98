"""Dilated causal convolution on packed rows without normalisation, mask or activation, with an optional residual.

`y[r] = bias + sum_k W[:, :, k] @ x[taps[r, k]] (+ residual[residual_rows[r]])`

What `masked_conv` does before its LayerNorm: the last convolution of a pre-activation block (He et al. 2016, arXiv 1603.05027)
has none. Plain PyTorch operations on every device: no compiled kernel computes it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from teracon_fast.errors import ShapeError
from teracon_fast.ops.masked_conv import torch as rows_of
from teracon_fast.packing import ResidualTable, TapTable


def packed_conv(
    x: Tensor, weight: Tensor, bias: Tensor, table: TapTable, *, residual: Tensor | None = None,
    residual_table: ResidualTable | None = None,
) -> Tensor:  # fmt: skip
    """One convolution over packed rows.

    Under autocast activations take the autocast dtype; parameters keep theirs and are rounded where they are used.

    Args:
        x: floating `[table.rows_in, f_in]`. In half precision weight and bias may be float32.
        weight: `[f_out, f_in, K]` (the layout of `nn.Conv1d`). bias: `[f_out]`.
        table: which rows each output row reads, without padding (see `teracon_fast.packing`).
        residual: `[rows, f_out]` added through `residual_table`; both or none.

    Returns:
        `[rows_out, f_out]`, differentiable with respect to every floating argument. Gradients are gathered, so that results are
        the same from run to run.

    Raises:
        ShapeError: when shapes, dtypes or devices do not fit.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        residual = None if residual is None else residual.to(dtype)
    _check(x, weight, bias, table, residual, residual_table)
    output: Tensor = _PackedConv.apply(x, weight, bias, residual, table, residual_table)  # type: ignore[no-untyped-call]
    return output


def _check(
    x: Tensor, weight: Tensor, bias: Tensor, table: TapTable, residual: Tensor | None, residual_table: ResidualTable | None
) -> None:
    if weight.dim() != 3:
        raise ShapeError(f"packed_conv: weight is {list(weight.shape)}, expected [f_out, f_in, K]")
    f_out, f_in, kernel_size = weight.shape
    wide = (x.dtype, torch.float32) if x.dtype in (torch.bfloat16, torch.float16) else (x.dtype,)
    expected: list[tuple[str, Tensor, tuple[int, ...], tuple[torch.dtype, ...]]] = [
        ("x", x, (table.rows_in, f_in), (torch.float64, torch.float32, torch.bfloat16, torch.float16)),
        ("weight", weight, (f_out, f_in, kernel_size), wide),
        ("bias", bias, (f_out,), (weight.dtype,)),
        ("table.taps", table.taps, (sum(table.rows_per_request), kernel_size), (torch.int32,)),
        ("table.readers", table.readers, (table.rows_in, kernel_size), (torch.int32,)),
    ]
    if (residual is None) != (residual_table is None):
        raise ShapeError("packed_conv: residual and residual_table go together: one is given, the other is not")
    if residual is not None and residual_table is not None:
        expected.append(("residual", residual, (residual_table.readers.shape[0], f_out), (x.dtype,)))
        expected.append(("residual_table.rows", residual_table.rows, (table.taps.shape[0],), (torch.int32,)))
    for name, tensor, shape, dtypes in expected:
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or tensor.device != x.device:
            raise ShapeError(
                f"packed_conv: {name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, "
                f"expected {' or '.join(map(str, dtypes))} {list(shape)} on {x.device}"
            )


class _PackedConv(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, table: TapTable,
        residual_table: ResidualTable | None,
    ) -> Tensor:  # fmt: skip
        f_out = weight.shape[0]
        kernel, shift = weight.to(x.dtype).permute(2, 1, 0).reshape(-1, f_out), bias.to(x.dtype)
        out = x.new_empty(table.taps.shape[0], f_out)
        for part in _parts(table.taps, kernel, x):
            torch.addmm(shift, rows_of._gather(x, table.taps[part]), kernel, out=out[part])
            if residual is not None and residual_table is not None:
                out[part] += residual.index_select(0, residual_table.rows[part])
        ctx.save_for_backward(x, weight)
        ctx.table, ctx.residual_table, ctx.bias_dtype = table, residual_table, bias.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        table: TapTable = ctx.table
        f_out, f_in, kernel_size = weight.shape
        grad = grad.contiguous()
        sums = rows_of.statistics_dtype(x.dtype)
        d_x = d_weight = d_bias = d_residual = None
        if ctx.needs_input_grad[1]:
            d_kernel = x.new_zeros(kernel_size * f_in, f_out, dtype=sums)
            for part in _parts(table.taps, d_kernel, x):
                product = rows_of._gather(x, table.taps[part]).t()
                if sums == x.dtype:
                    d_kernel.addmm_(product, grad[part])
                else:
                    d_kernel += product @ grad[part]
            d_weight = d_kernel.view(kernel_size, f_in, f_out).permute(2, 1, 0).contiguous().to(weight.dtype)
        if ctx.needs_input_grad[2]:
            d_bias = grad.sum(0, dtype=sums).to(ctx.bias_dtype)
        if ctx.needs_input_grad[0]:
            dz = grad
            if table.bag_offsets.shape[0] > 1:
                bags = F.embedding_bag(table.bag_rows, grad, table.bag_offsets, mode="sum", include_last_offset=True)
                dz = torch.cat([grad, bags])
            d_x = rows_of._gather_gemm(dz, table.readers, weight.to(x.dtype).permute(2, 0, 1).reshape(-1, f_in))
        if ctx.needs_input_grad[3]:
            d_residual = rows_of._gather(grad, ctx.residual_table.readers[:, None])
        return d_x, d_weight, d_bias, d_residual, None, None


def _parts(taps: Tensor, kernel: Tensor, x: Tensor) -> list[slice]:
    """Slices of output rows whose gathered taps stay in cache."""
    chunks = rows_of._chunks([taps.shape[0]], kernel.shape[0] * x.element_size(), x.device)
    return [part for _, part in chunks]
