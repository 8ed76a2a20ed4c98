"""`packed_conv` in plain PyTorch operations, on every device and in every floating dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from teracon_fast.ops.checks import sums_dtype
from teracon_fast.ops.rows import add_product, bag_sums, chunks, gather_taps, input_gradient, kernel_of, weight_gradient
from teracon_fast.packing import ResidualTable, TapTable


class PackedConv(torch.autograd.Function):
    """Arguments as `ops.packed_conv`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, table: TapTable,
        residual_table: ResidualTable | None,
    ) -> Tensor:  # fmt: skip
        kernel, shift = kernel_of(weight, x.dtype), bias.to(x.dtype)
        out = x.new_empty(table.taps.shape[0], weight.shape[0])
        for part in _parts(table.taps, kernel, x):
            torch.addmm(shift, gather_taps(x, table.taps[part]), kernel, out=out[part])
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
        grad, sums = grad.contiguous(), sums_dtype(x.dtype)
        d_x = d_weight = d_bias = d_residual = None
        if ctx.needs_input_grad[1]:
            d_kernel = x.new_zeros(kernel_size * f_in, f_out, dtype=sums)
            for part in _parts(table.taps, d_kernel, x):
                add_product(d_kernel, gather_taps(x, table.taps[part]), grad[part])
            d_weight = weight_gradient(d_kernel, weight)
        if ctx.needs_input_grad[2]:
            d_bias = grad.sum(0, dtype=sums).to(ctx.bias_dtype)
        if ctx.needs_input_grad[0]:
            dz = grad
            if table.bag_offsets.shape[0] > 1:
                dz = torch.cat([grad, bag_sums(grad, table.bag_rows, table.bag_offsets)])
            d_x = input_gradient(dz, table.readers, weight)
        if ctx.needs_input_grad[3]:
            d_residual = gather_taps(grad, ctx.residual_table.readers[:, None])
        return d_x, d_weight, d_bias, d_residual, None, None


def _parts(taps: Tensor, kernel: Tensor, x: Tensor) -> list[slice]:
    """Slices of output rows whose gathered taps stay in cache."""
    return [part for _, part in chunks([taps.shape[0]], kernel.shape[0] * x.element_size(), x.device)]
