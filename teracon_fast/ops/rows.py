"""Rows of a matrix by index in plain PyTorch: with the same bits from run to run, forward and backward, on every device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from teracon_fast.errors import ShapeError
from teracon_fast.ops.checks import expect, parameter_dtypes
from teracon_fast.packing import ResidualTable, TapTable

# Bytes of gathered taps per chunk: small enough for a shared cache of a few MiB, large enough that a GEMM runs at full rate.
_CHUNK_BYTES = 3 << 20
_CHUNK_BYTES_DEVICE = 1 << 30


def gather_rows(source: Tensor, rows: Tensor) -> Tensor:
    """`source[rows]` for `source` `[R, f]` and `rows` int64 of any shape; result `[*rows.shape, f]`.

    `F.embedding`'s gradient adds the readers of a row in order and in parallel over rows; `index_select`'s walks the readers
    one by one.
    """
    return F.embedding(rows, source)


def chunks(rows_per_request: Sequence[int], row_bytes: int, device: torch.device) -> Iterator[tuple[int, slice]]:
    """(request, rows) pairs that cover all rows in order, whose gathered taps stay in cache; none spans two requests."""
    step = max(64, (_CHUNK_BYTES if device.type == "cpu" else _CHUNK_BYTES_DEVICE) // row_bytes)
    begin = 0
    for request, count in enumerate(rows_per_request):
        for low in range(begin, begin + count, step):
            yield request, slice(low, min(low + step, begin + count))
        begin += count


def gather_taps(source: Tensor, table: Tensor) -> Tensor:
    """`[n, K * width]`: rows of `source` named by `table` int32 `[n, K]`, zeros where it says -1."""
    shape = (table.shape[0], table.shape[1] * source.shape[1])
    if not source.shape[0]:
        return source.new_zeros(shape)
    flat = table.reshape(-1)
    missing = flat < 0
    rows = source.index_select(0, flat.clamp_min(0))
    if source.device.type == "cpu":
        # Few entries are -1: clear those alone instead of passing over all rows.
        rows.index_fill_(0, missing.nonzero().squeeze(1), 0)
    else:
        rows.masked_fill_(missing[:, None], 0)
    return rows.view(shape)


def kernel_of(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`[K * f_in, f_out]` of a convolution's weight `[f_out, f_in, K]`: gathered taps times it are the convolution."""
    return weight.to(dtype).permute(2, 1, 0).reshape(-1, weight.shape[0])


def weight_gradient(d_kernel: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a weight `[f_out, f_in, K]` from that of its `kernel_of`."""
    f_out, f_in, kernel_size = weight.shape
    return d_kernel.view(kernel_size, f_in, f_out).permute(2, 1, 0).contiguous().to(weight.dtype)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left.T @ right`, where total may be wider than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left.t(), right)
    else:
        total += left.t() @ right


def input_gradient(dz: Tensor, readers: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a convolution's input: each row gathers `dz` `[rows + bags, f_out]` from its readers `[rows_in, K]`."""
    matrix = weight.to(dz.dtype).permute(2, 0, 1).reshape(-1, weight.shape[1])
    out = dz.new_empty(readers.shape[0], matrix.shape[1])
    for _, part in chunks([readers.shape[0]], matrix.shape[0] * dz.element_size(), dz.device):
        torch.mm(gather_taps(dz, readers[part]), matrix, out=out[part])
    return out


def bag_sums(dz: Tensor, bag_rows: Tensor, bag_offsets: Tensor) -> Tensor:
    """`[bags, f]`: sums of rows of `dz` over each bag."""
    return F.embedding_bag(bag_rows, dz, bag_offsets, mode="sum", include_last_offset=True)


def check_convolution(
    operation: str, x: Tensor, weight: Tensor, bias: Tensor, table: TapTable, residual: Tensor | None,
    residual_table: ResidualTable | None,
) -> None:  # fmt: skip
    """Raise ShapeError unless activations, weight, tables and residual of a convolution over packed rows fit together."""
    if weight.dim() != 3:
        raise ShapeError(f"{operation}: weight is {list(weight.shape)}, expected [f_out, f_in, K]")
    if not x.dtype.is_floating_point:
        raise ShapeError(f"{operation}: x is {x.dtype}, expected a floating dtype")
    f_out, f_in, kernel_size = weight.shape
    rows, same = table.taps.shape[0], (x.dtype,)
    expect(operation, "x", x, (table.rows_in, f_in), x, same)
    expect(operation, "weight", weight, (f_out, f_in, kernel_size), x, parameter_dtypes(x.dtype))
    expect(operation, "bias", bias, (f_out,), x, (weight.dtype,))
    expect(operation, "table.taps", table.taps, (rows, kernel_size), x, (torch.int32,))
    expect(operation, "table.readers", table.readers, (table.rows_in, kernel_size), x, (torch.int32,))
    if sum(table.rows_per_request) != rows:
        raise ShapeError(f"{operation}: rows_per_request sums to {sum(table.rows_per_request)}, expected {rows} rows")
    if (residual is None) != (residual_table is None):
        raise ShapeError(f"{operation}: residual and residual_table go together: one is given, the other is not")
    if residual is not None and residual_table is not None:
        expect(operation, "residual", residual, (residual_table.readers.shape[0], f_out), x, same)
        expect(operation, "residual_table.rows", residual_table.rows, (rows,), x, (torch.int32,))
