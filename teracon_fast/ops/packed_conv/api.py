"""Dilated causal convolution on packed rows without normalization, mask or activation, with an optional residual.

`y[r] = bias + sum_k W[:, :, k] @ x[taps[r, k]] (+ residual[residual_rows[r]])`

What `masked_conv` does before its LayerNorm: the last convolution of a pre-activation block (He et al. 2016, arXiv 1603.05027)
has none. Plain PyTorch operations on every device: no compiled kernel computes it.
"""

from __future__ import annotations

from torch import Tensor

from teracon_fast.ops.checks import autocast
from teracon_fast.ops.packed_conv.torch import PackedConv
from teracon_fast.ops.rows import check_convolution
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
    x, residual = autocast(x), None if residual is None else autocast(residual)
    check_convolution("packed_conv", x, weight, bias, table, residual, residual_table)
    output: Tensor = PackedConv.apply(x, weight, bias, residual, table, residual_table)  # type: ignore[no-untyped-call]
    return output
