"""`masked_conv` by the compiled C++ kernels: float32 and bfloat16 activations on the CPU. The `cpu` backend; see csrc/cpu.

Parameters and masks reach the kernels in float32, whatever the activations are: the kernels round the weights themselves when
they put them into the order of their register tiles, and return the gradients unrounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

# As in csrc/cpu/masked_conv.h.
_ALGORITHMS = {"auto": 0, "direct": 1, "winograd": 2}


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, ln_weight: Tensor, ln_bias: Tensor, mask: Tensor, taps: Tensor, readers: Tensor,
    bags: int, rows_per_request: list[int], row_ends: Tensor, residual: Tensor | None,
    residual_rows: Tensor | None, eps: float,
    algorithm: str, save: bool, addend: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `_torch_masked_conv.forward`."""
    rows, kept = taps.shape[0], taps.shape[0] if save else 0
    out, conv = x.new_empty(rows, weight.shape[0]), x.new_empty(kept, weight.shape[0])
    mean, rstd = torch.empty(kept, 1), torch.empty(kept, 1)
    none = x.new_empty(0)
    torch.ops.teracon_fast.masked_conv_cpu_forward(
        x.contiguous(), *_wide(weight, bias, ln_weight, ln_bias, mask), taps.contiguous(), readers.contiguous(), bags,
        torch.tensor(rows_per_request, dtype=torch.int64), eps, _ALGORITHMS[algorithm], torch.get_num_threads(),
        none if addend is None else addend.contiguous(), none if residual is None else residual.contiguous(),
        none if residual_rows is None else residual_rows.contiguous(), out, conv, mean, rstd,
    )  # fmt: skip
    return out, conv, mean, rstd


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, ln_weight: Tensor, ln_bias: Tensor, mask: Tensor, taps: Tensor,
    readers: Tensor, bag_rows: Tensor, bag_offsets: Tensor, rows_per_request: list[int], row_ends: Tensor,
    residual_readers: Tensor | None, conv: Tensor, mean: Tensor, rstd: Tensor, eps: float, algorithm: str, need_input: bool,
    need_weight: bool, need_addend: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `_torch_masked_conv.backward`."""
    f_out = weight.shape[0]
    none = x.new_empty(0)
    d_x = x.new_empty(x.shape) if need_input else none
    d_weight, d_mask = torch.empty(weight.shape if need_weight else (0,)), torch.empty(mask.shape)
    d_bias, d_ln_weight, d_ln_bias = (torch.empty(f_out) for _ in range(3))
    d_residual = none if residual_readers is None else x.new_empty(residual_readers.shape[0], f_out)
    d_addend = x.new_empty(grad.shape) if need_addend else none
    torch.ops.teracon_fast.masked_conv_cpu_backward(
        x.contiguous(), *_wide(weight, d_bias, ln_weight, ln_bias, mask),  # the bias itself is not needed
        taps.contiguous(), readers.contiguous(), torch.tensor(rows_per_request, dtype=torch.int64), eps,
        _ALGORITHMS[algorithm], torch.get_num_threads(), grad.contiguous(), conv, mean, rstd, bag_rows.contiguous(),
        bag_offsets.contiguous(), none if residual_readers is None else residual_readers.contiguous(),
        d_x, d_weight, d_bias, d_ln_weight, d_ln_bias, d_mask, d_residual, d_addend,
    )  # fmt: skip
    return (
        d_x, d_weight.to(weight.dtype), d_bias.to(weight.dtype), d_ln_weight.to(ln_weight.dtype),
        d_ln_bias.to(ln_bias.dtype), d_mask.to(mask.dtype), d_residual, d_addend,
    )  # fmt: skip


def _wide(*parameters: Tensor) -> list[Tensor]:
    return [parameter.float().contiguous() for parameter in parameters]
