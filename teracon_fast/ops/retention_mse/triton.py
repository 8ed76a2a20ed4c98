"""`retention_mse` by Triton kernels. The `triton` backend."""

from __future__ import annotations

from teracon_fast.kernels import retention_mse as kernels
from teracon_fast.kernels.tiles import dot_precision
from teracon_fast.ops.heads import Head
from teracon_fast.ops.retention_mse.api import Inputs, Results


def distance(inputs: Inputs) -> Results:
    """As `torch.distance`."""
    student, teacher, coefficient, valid, _, _, needs, _ = inputs
    loss, *gradients = kernels.forward_backward(
        *student, *teacher, coefficient, any(needs), valid, dot_precision(coefficient.device)
    )
    return Results(loss, Head(*(g if need else g.new_empty(0) for g, need in zip(gradients, needs, strict=True))))
