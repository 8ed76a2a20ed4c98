"""`linear_cross_entropy` by Triton kernels. The `triton` backend."""

from __future__ import annotations

import torch

from teracon_fast.kernels import linear_cross_entropy as kernels
from teracon_fast.kernels.tiles import dot_precision
from teracon_fast.ops.checks import require_range
from teracon_fast.ops.heads import Head
from teracon_fast.ops.linear_cross_entropy.api import Backward, Gradients, Inputs, Kept, Results


def room(inputs: Inputs) -> Kept:
    """Nothing is kept but statistics: logits are formed again."""
    hidden = inputs.head.hidden
    none = (hidden.new_empty(0, dtype=torch.float32) for _ in range(2))
    return Kept(hidden.new_empty(2, len(hidden), dtype=torch.float32), *none)


def forward(inputs: Inputs) -> Results:
    """As `torch.forward`."""
    (hidden, weight, _), targets, rows = inputs[:3]
    require_range("linear_cross_entropy", targets, weight.shape[0], "targets")
    require_range("linear_cross_entropy", rows, hidden.shape[0], "rows")
    losses, statistics, best, rank = kernels.forward(*inputs.head, targets, rows, inputs.predict, dot_precision(hidden.device))
    return Results(losses, room(inputs)._replace(statistics=statistics), best, rank)


def backward(backward: Backward) -> Gradients:
    """As `torch.backward`."""
    grad, inputs, kept, need_hidden, need_weight = backward
    found = kernels.backward(
        grad, *inputs.head, inputs.targets, inputs.rows, kept.statistics, need_hidden, need_weight, inputs.filter_eps,
        dot_precision(grad.device),
    )  # fmt: skip
    return Gradients(Head(*found))
