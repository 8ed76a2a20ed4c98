"""`linear_cross_entropy` by Triton kernels. The `triton` backend."""

from __future__ import annotations

from torch import Tensor

from teracon_fast.ops.heads import require_range
from teracon_fast.ops.linear_cross_entropy.torch import Forward, Shape


def kept_shapes(rows: int, labels: int, save: bool) -> tuple[Shape, Shape]:
    """Nothing is kept: logits are formed again."""
    return (0,), (0,)


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, save: bool, predict: bool
) -> Forward:
    """As `_torch_linear_cross_entropy.forward`."""
    from teracon_fast.kernels import linear_cross_entropy as kernels
    from teracon_fast.kernels.tiles import dot_precision

    require_range("linear_cross_entropy", targets, weight.shape[0], "targets")
    require_range("linear_cross_entropy", rows, hidden.shape[0], "rows")
    losses, statistics, best, rank = kernels.forward(
        hidden, weight, bias, targets, rows, predict, dot_precision(hidden.device)
    )
    return losses, statistics, statistics.new_empty(0), statistics.new_empty(0), best, rank


def backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, statistics: Tensor,
    kept: Tensor, highest: Tensor, filter_eps: float, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `_torch_linear_cross_entropy.backward`."""
    from teracon_fast.kernels import linear_cross_entropy as kernels
    from teracon_fast.kernels.tiles import dot_precision

    return kernels.backward(
        grad, hidden, weight, bias, targets, rows, statistics, need_hidden, need_weight, filter_eps,
        dot_precision(hidden.device),
    )
