"""`linear_cross_entropy` by the compiled C++ kernels: float32 and bfloat16 hidden states on the CPU. The `cpu` backend.

Labels are taken in blocks: the logits of some rows under a block stay in the cache. With hidden states in bfloat16, matrix
products are of bfloat16 where the processor multiplies pairs of them, else of float32; everything else is float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from teracon_fast.ops.heads_cpu import block_of, dense_head, schedule
from teracon_fast.ops.linear_cross_entropy.torch import Forward, Shape

# Backward is a third faster with the exponentials of all logits kept from forward. Beyond this size it forms them again: malloc
# gives larger memory back to the system every time, and getting it anew can cost more than the product.
KEPT_BYTES = 32 << 20
# A loss that is formed with its gradients keeps exponentials for a turn only, in one array for all turns: as many rows as
# KEPT_BYTES allow, or, of many labels, more of them.
TURN_BYTES = 160 << 20
_MOST_ROWS = 384
# Fewer rows than this do not pay for walking over weight and d(weight) once more. Forming logits again costs half where pairs of
# bfloat16 are multiplied, and the walk as much as ever.
_FEWEST_ROWS = {torch.float32: 128, torch.bfloat16: 256}


def _kept_shapes(rows: int, labels: int) -> tuple[Shape, Shape]:
    padded = (rows + 31) // 32 * 32
    return (labels * padded,), (-(-labels // block_of(labels)), padded)


def kept_shapes(rows: int, labels: int, save: bool) -> tuple[Shape, Shape]:
    """Shapes of what forward keeps for backward: exponentials, and the maxima that they refer to; see csrc/cpu."""
    shapes = _kept_shapes(rows, labels)
    return shapes if save and 4 * shapes[0][0] <= KEPT_BYTES else ((0,), (0,))


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, save: bool, predict: bool
) -> Forward:
    """As `_torch_linear_cross_entropy.forward`."""
    kept = [torch.empty(shape) for shape in kept_shapes(hidden.shape[0], weight.shape[0], save)]
    return _forward_into(*dense_head(hidden, weight, bias), targets, rows, kept, predict)


def _forward_into(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, kept: list[Tensor], predict: bool
) -> Forward:
    losses, statistics = torch.empty(targets.shape[0]), torch.empty(2, hidden.shape[0])
    best = torch.empty(hidden.shape[0] if predict else 0, dtype=torch.int64)
    rank = torch.empty(targets.shape[0] if predict else 0, dtype=torch.int64)
    torch.ops.teracon_fast.linear_cross_entropy_cpu_forward(
        hidden, weight, bias, targets.contiguous(), rows.contiguous(), *schedule(weight.shape[0]), losses, statistics, *kept,
        best, rank,
    )  # fmt: skip
    return losses, statistics, kept[0], kept[1], best, rank


def backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, statistics: Tensor,
    exponentials: Tensor, highest: Tensor, filter_eps: float, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `_torch_linear_cross_entropy.backward`."""
    d_hidden = torch.empty(hidden.shape if need_hidden else 0)
    d_weight = torch.empty(weight.shape if need_weight else 0, dtype=weight.dtype)
    d_bias = torch.empty(bias.shape)
    torch.ops.teracon_fast.linear_cross_entropy_cpu_backward(
        *dense_head(hidden, weight, bias), targets.contiguous(), rows.contiguous(), *schedule(weight.shape[0]), statistics,
        exponentials, highest, grad.float().contiguous(), False, filter_eps, d_hidden, d_weight, d_bias,
    )  # fmt: skip
    return d_hidden.to(hidden.dtype), d_weight, d_bias.to(bias.dtype)


def rows_at_once(rows: int, labels: int, hidden: torch.dtype, weight: torch.dtype) -> int | None:
    """Rows whose loss and gradients `reduced` forms together; None where something else is faster.

    All rows at once, where their exponentials may be kept, need no second walk over d(weight). A few rows at a time would
    walk over it too often.

    Args:
        rows, labels: R, C.
        hidden, weight: dtypes. Turns add to d(weight), which only float32 is good for.
    """
    if rows == 0 or kept_shapes(rows, labels, True)[0][0] > 0:
        return None
    at_once = max(KEPT_BYTES // (4 * labels), min(_MOST_ROWS, TURN_BYTES // (4 * labels))) // 32 * 32
    if at_once >= rows:
        return rows
    return at_once if at_once >= _FEWEST_ROWS[hidden] and weight == torch.float32 else None


def reduced(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, scales: Tensor, filter_eps: float,
    predict: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Sum of the losses, each times its scale, and its gradients: exponentials of some rows serve both, and are gone.

    So the logits are formed once, without an array of all rows and labels.

    Returns:
        The sum, gradients of hidden, weight and bias, and the predictions (empty unless wanted).
    """
    count, labels = hidden.shape[0], weight.shape[0]
    at_once = rows_at_once(count, labels, hidden.dtype, weight.dtype)
    assert at_once is not None
    states, wide_weight, wide_bias = dense_head(hidden, weight, bias)
    d_hidden, d_weight, d_bias = torch.empty(hidden.shape), torch.empty(weight.shape, dtype=weight.dtype), torch.empty(bias.shape)
    best = torch.empty(count if predict else 0, dtype=torch.int64)
    rank = torch.empty(targets.shape[0] if predict else 0, dtype=torch.int64)
    rows, order = rows.sort(stable=True)
    targets, scales = targets[order], scales[order].float()
    begins = range(0, count, at_once)
    ends = torch.searchsorted(rows, torch.tensor([begin + at_once for begin in begins])).tolist()
    total, from_target = torch.zeros((), dtype=torch.float64), 0
    # One array for all turns: fresh memory costs a good part of what keeping the exponentials saves.
    room = [torch.empty(math.prod(shape)) for shape in _kept_shapes(at_once, labels)]
    for begin, end in zip(begins, ends, strict=True):
        turn, own, row_of = slice(begin, begin + at_once), targets[from_target:end], rows[from_target:end] - begin
        part, scale = states[turn], scales[from_target:end]
        kept = [array[: math.prod(shape)] for array, shape in zip(room, _kept_shapes(part.shape[0], labels), strict=True)]
        losses, statistics, *_, own_best, own_rank = _forward_into(part, wide_weight, wide_bias, own, row_of, kept, predict)
        torch.ops.teracon_fast.linear_cross_entropy_cpu_backward(
            part, wide_weight, wide_bias, own, row_of, *schedule(labels), statistics, *kept, scale, begin > 0, filter_eps,
            d_hidden[turn], d_weight, d_bias,
        )  # fmt: skip
        total += torch.dot(losses.double(), scale.double())
        if predict:
            best[turn] = own_best
            rank[order[from_target:end]] = own_rank
        from_target = end
    return total.float(), d_hidden.to(hidden.dtype), d_weight, d_bias.to(bias.dtype), best, rank
