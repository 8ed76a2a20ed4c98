"""`masked_conv` by Triton kernels. The `triton` backend.

The device is not waited for, so nothing is said of a table that names a row which is not there: it is never read, and counts
as a row of zeros.
"""

from __future__ import annotations

from torch import Tensor

from teracon_fast.ops.backends import BackendError


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, ln_weight: Tensor, ln_bias: Tensor, mask: Tensor, taps: Tensor,
    readers: Tensor, bags: int, rows_per_request: list[int], row_ends: Tensor, residual: Tensor | None,
    residual_rows: Tensor | None, eps: float, algorithm: str, save: bool, addend: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `_torch_masked_conv.forward`; rows from `row_ends[-1]` on are left unwritten.

    Raises:
        BackendError: for more channels than a program's registers hold.
    """
    from teracon_fast.kernels import masked_conv as kernels
    from teracon_fast.kernels.tiles import dot_precision

    most = max(weight.shape[:2])
    if most > kernels.MOST_CHANNELS:
        raise BackendError(f"masked_conv: backend 'triton' takes up to {kernels.MOST_CHANNELS} channels, got {most}")
    return kernels.forward(
        x, weight, bias, ln_weight, ln_bias, mask, taps, row_ends, residual, residual_rows, eps, save, dot_precision(x.device),
        addend,
    )  # fmt: skip


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, ln_weight: Tensor, ln_bias: Tensor, mask: Tensor, taps: Tensor,
    readers: Tensor, bag_rows: Tensor, bag_offsets: Tensor, rows_per_request: list[int], row_ends: Tensor,
    residual_readers: Tensor | None, conv: Tensor, mean: Tensor, rstd: Tensor, eps: float, algorithm: str, need_input: bool,
    need_weight: bool, need_addend: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `_torch_masked_conv.backward`."""
    from teracon_fast.kernels import masked_conv_backward as kernels
    from teracon_fast.kernels.tiles import dot_precision

    return kernels.backward(
        grad, x, weight, ln_weight, ln_bias, mask, taps, readers, bag_rows, bag_offsets, row_ends, residual_readers,
        conv, mean, rstd, need_input, dot_precision(x.device), need_weight, need_addend,
    )  # fmt: skip
