"""`linear_cross_entropy` in plain PyTorch operations: any device, any floating dtype, all logits at once. The `torch` backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from teracon_fast.ops.checks import require_range, sums_dtype
from teracon_fast.ops.heads import Head
from teracon_fast.ops.linear_cross_entropy.api import Backward, Gradients, Inputs, Kept, Results
from teracon_fast.ops.linear_rank.torch import ranks_among


def room(inputs: Inputs) -> Kept:
    """All logits are kept."""
    (hidden, weight, _), wide = inputs.head, sums_dtype(inputs.head.hidden.dtype)
    logits = hidden.new_empty((len(hidden), len(weight)) if inputs.save else (0,))
    return Kept(hidden.new_empty(2, len(hidden), dtype=wide), logits, hidden.new_empty(0, dtype=wide))


def forward(inputs: Inputs) -> Results:
    """Losses, what backward needs, and predictions."""
    (hidden, weight, bias), targets, rows = inputs[:3]
    require_range("linear_cross_entropy", targets, weight.shape[0], "targets")
    require_range("linear_cross_entropy", rows, hidden.shape[0], "rows")
    logits = F.linear(hidden, weight.to(hidden.dtype), bias.to(hidden.dtype))
    wide = logits.to(sums_dtype(hidden.dtype))
    # A finite bound, because -inf less itself would be NaN.
    maximum = wide.amax(1).clamp_min(torch.finfo(wide.dtype).min)
    total = (wide - maximum[:, None]).exp_().sum(1)
    # Differences first: the loss of a certain label is far below its logit.
    losses = (maximum[rows] - wide[rows, targets]) + total.log()[rows]
    best, rank = targets.new_empty(0), targets.new_empty(0)
    if inputs.predict:
        best = wide.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).argmax(1)
        rank = ranks_among(wide, targets, rows)
    kept = Kept(torch.stack([maximum, total]), logits if inputs.save else hidden.new_empty(0), wide.new_empty(0))
    return Results(losses, kept, best, rank)


def backward(backward: Backward) -> Gradients:
    """One dense gradient of the logits, written once. `filter_eps` changes nothing here: there are no tiles to leave out."""
    grad, ((hidden, weight, bias), targets, rows, *_), ((maximum, total), logits, _), need_hidden, need_weight = backward
    scale = grad.new_zeros(hidden.shape[0]).index_add_(0, rows, grad) / total
    d_logits = (logits - maximum[:, None]).exp_().mul_(scale[:, None])
    d_logits.index_put_((rows, targets), -grad, accumulate=True)
    d_bias = d_logits.sum(0).to(bias.dtype)
    d_logits = d_logits.to(hidden.dtype)
    d_hidden = d_logits @ weight.to(hidden.dtype) if need_hidden else hidden.new_empty(0)
    d_weight = (d_logits.t() @ hidden).to(weight.dtype) if need_weight else weight.new_empty(0)
    return Gradients(Head(d_hidden, d_weight, d_bias))
