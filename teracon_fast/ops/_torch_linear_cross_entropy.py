"""`linear_cross_entropy` in plain PyTorch operations: any device, any floating dtype, all logits at once. The `torch` backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Shape = tuple[int, ...]


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of losses and statistics: float32 for half precisions, else that of the hidden states."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def kept_shapes(rows: int, labels: int, save: bool) -> tuple[Shape, Shape]:
    """Shapes of what forward keeps for backward: all logits, and nothing else."""
    return ((rows, labels) if save else (0,)), (0,)


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses `[N]`, each row's maximum and sum of `exp(logit - maximum)` `[2, R]`, and what backward needs."""
    _require_range(targets, weight.shape[0], "targets")
    _require_range(rows, hidden.shape[0], "rows")
    logits = F.linear(hidden, weight.to(hidden.dtype), bias.to(hidden.dtype))
    wide = logits.to(sums_dtype(hidden.dtype))
    # A finite bound, because -inf less itself would be NaN.
    maximum = wide.amax(1).clamp_min(torch.finfo(wide.dtype).min)
    total = (wide - maximum[:, None]).exp_().sum(1)
    # Differences first: the loss of a certain label is far below its logit.
    losses = (maximum[rows] - wide[rows, targets]) + total.log()[rows]
    return losses, torch.stack([maximum, total]), logits if save else hidden.new_empty(0), wide.new_empty(0)


def backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, statistics: Tensor,
    logits: Tensor, _: Tensor, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, weight (both empty where not needed) and bias: one dense gradient of the logits, written once."""
    maximum, total = statistics
    scale = grad.new_zeros(hidden.shape[0]).index_add_(0, rows, grad) / total
    d_logits = (logits - maximum[:, None]).exp_().mul_(scale[:, None])
    d_logits.index_put_((rows, targets), -grad, accumulate=True)
    d_bias = d_logits.sum(0).to(bias.dtype)
    d_logits = d_logits.to(hidden.dtype)
    d_hidden = d_logits @ weight.to(hidden.dtype) if need_hidden else hidden.new_empty(0)
    d_weight = (d_logits.t() @ hidden).to(weight.dtype) if need_weight else weight.new_empty(0)
    return d_hidden, d_weight, d_bias


def _require_range(values: Tensor, limit: int, name: str) -> None:
    """Numbers in 0..limit-1: indexing itself would take negative ones from the end."""
    if values.device.type != "cpu":
        torch._assert_async(((values >= 0) & (values < limit)).all())
    elif values.numel():
        low, high = (int(value) for value in values.aminmax())
        if low < 0 or high >= limit:
            raise IndexError(
                f"linear_cross_entropy: {name} has {low if low < 0 else high}, which is out of range: expected 0 to {limit - 1}"
            )
