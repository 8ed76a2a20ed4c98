"""`masked_conv` by the compiled C++ kernels: float32 on the CPU. The `cpu` backend; see csrc/cpu."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, ln_weight: Tensor, ln_bias: Tensor, mask: Tensor, taps: Tensor,
    rows_per_request: list[int], residual: Tensor | None, residual_rows: Tensor | None, eps: float, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `_torch_masked_conv.forward`."""
    rows, kept = taps.shape[0], taps.shape[0] if save else 0
    out, conv = x.new_empty(rows, weight.shape[0]), x.new_empty(kept, weight.shape[0])
    mean, rstd = x.new_empty(kept, 1), x.new_empty(kept, 1)
    none = x.new_empty(0)
    dense = [t.contiguous() for t in (x, weight, bias, ln_weight, ln_bias, mask, taps)]
    torch.ops.teracon_fast.masked_conv_cpu_forward(
        *dense, torch.tensor(rows_per_request, dtype=torch.int64), eps, torch.get_num_threads(),
        none if residual is None else residual.contiguous(),
        none if residual_rows is None else residual_rows.contiguous(), out, conv, mean, rstd,
    )  # fmt: skip
    return out, conv, mean, rstd


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, ln_weight: Tensor, ln_bias: Tensor, mask: Tensor, taps: Tensor,
    readers: Tensor, bag_rows: Tensor, bag_offsets: Tensor, rows_per_request: list[int],
    residual_readers: Tensor | None, conv: Tensor, mean: Tensor, rstd: Tensor, eps: float, need_input: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `_torch_masked_conv.backward`."""
    f_out = weight.shape[0]
    none = x.new_empty(0)
    d_x = x.new_empty(x.shape) if need_input else none
    d_weight, d_mask = weight.new_empty(weight.shape), mask.new_empty(mask.shape)
    d_bias, d_ln_weight, d_ln_bias = (x.new_empty(f_out) for _ in range(3))
    d_residual = none if residual_readers is None else x.new_empty(residual_readers.shape[0], f_out)
    dense = [t.contiguous() for t in (x, weight, d_bias, ln_weight, ln_bias, mask, taps)]  # the bias itself is not needed
    torch.ops.teracon_fast.masked_conv_cpu_backward(
        *dense, torch.tensor(rows_per_request, dtype=torch.int64), eps, torch.get_num_threads(),
        grad.contiguous(), conv, mean, rstd, readers.contiguous(), bag_rows.contiguous(), bag_offsets.contiguous(),
        none if residual_readers is None else residual_readers.contiguous(),
        d_x, d_weight, d_bias, d_ln_weight, d_ln_bias, d_mask, d_residual,
    )  # fmt: skip
    return d_x, d_weight, d_bias, d_ln_weight, d_ln_bias, d_mask, d_residual
