"""`linear_cross_entropy` in plain PyTorch operations: any device, any floating dtype, all logits at once. The `torch` backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from teracon_fast.ops.heads import require_range, sums_dtype
from teracon_fast.ops.linear_rank.torch import ranks_among

Shape = tuple[int, ...]
Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def kept_shapes(rows: int, labels: int, save: bool) -> tuple[Shape, Shape]:
    """Shapes of what forward keeps for backward: all logits, and nothing else."""
    return ((rows, labels) if save else (0,)), (0,)


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, save: bool, predict: bool
) -> Forward:
    """Losses `[N]`, each row's maximum and sum of `exp(logit - maximum)` `[2, R]`, two tensors that backward needs, and the
    predictions: each row's best label `[R]` and each target's rank `[N]`, empty unless wanted."""
    require_range("linear_cross_entropy", targets, weight.shape[0], "targets")
    require_range("linear_cross_entropy", rows, hidden.shape[0], "rows")
    logits = F.linear(hidden, weight.to(hidden.dtype), bias.to(hidden.dtype))
    wide = logits.to(sums_dtype(hidden.dtype))
    # A finite bound, because -inf less itself would be NaN.
    maximum = wide.amax(1).clamp_min(torch.finfo(wide.dtype).min)
    total = (wide - maximum[:, None]).exp_().sum(1)
    # Differences first: the loss of a certain label is far below its logit.
    losses = (maximum[rows] - wide[rows, targets]) + total.log()[rows]
    best = wide.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).argmax(1) if predict else targets.new_empty(0)
    rank = ranks_among(wide, targets, rows) if predict else targets.new_empty(0)
    kept = logits if save else hidden.new_empty(0)
    return losses, torch.stack([maximum, total]), kept, wide.new_empty(0), best, rank


def backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, statistics: Tensor,
    logits: Tensor, _: Tensor, filter_eps: float, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, weight (both empty where not needed) and bias: one dense gradient of the logits, written once.

    `filter_eps` changes nothing here: there are no tiles to leave out.
    """
    maximum, total = statistics
    scale = grad.new_zeros(hidden.shape[0]).index_add_(0, rows, grad) / total
    d_logits = (logits - maximum[:, None]).exp_().mul_(scale[:, None])
    d_logits.index_put_((rows, targets), -grad, accumulate=True)
    d_bias = d_logits.sum(0).to(bias.dtype)
    d_logits = d_logits.to(hidden.dtype)
    d_hidden = d_logits @ weight.to(hidden.dtype) if need_hidden else hidden.new_empty(0)
    d_weight = (d_logits.t() @ hidden).to(weight.dtype) if need_weight else weight.new_empty(0)
    return d_hidden, d_weight, d_bias
