"""`linear_cross_entropy` by the compiled C++ kernels: float32 and bfloat16 hidden states on the CPU. The `cpu` backend.

Labels are processed in blocks: the logits of some rows under a block stay in the cache. With hidden states in bfloat16, matrix
products are of bfloat16 if the processor has instructions for it, else of float32; everything else is float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from teracon_fast.ops.heads import Head, block_of, dense_head, schedule
from teracon_fast.ops.linear_cross_entropy.api import (
    Backward,
    Gradients,
    Inputs,
    Kept,
    Reduced,
    ReducedInputs,
    Results,
    predictions_of,
)

Shape = tuple[int, ...]

# Backward is a third faster with the exponentials of all logits kept from forward. Beyond this size it recomputes them: malloc
# returns larger blocks to the system every time, and fresh pages can cost more than the product.
KEPT_BYTES = 32 << 20
# A loss computed with its gradients keeps the exponentials of one chunk of rows, in one array for all chunks: as many rows as
# KEPT_BYTES allow, or more if there are many labels.
TURN_BYTES = 160 << 20
_MOST_ROWS = 384
# Chunks with fewer rows do not pay for another pass over weight and d(weight). With bfloat16 instructions recomputing logits
# costs half, and the pass as much as before.
_FEWEST_ROWS = {torch.float32: 128, torch.bfloat16: 256}


def _kept_shapes(rows: int, labels: int) -> tuple[Shape, Shape]:
    """Of the exponentials, and of the maxima that they refer to; see csrc/cpu."""
    padded = (rows + 31) // 32 * 32
    return (labels * padded,), (-(-labels // block_of(labels)), padded)


def room(inputs: Inputs) -> Kept:
    """Exponentials, where they may be kept."""
    hidden, shapes = inputs.head.hidden, _kept_shapes(len(inputs.head.hidden), len(inputs.head.weight))
    if not (inputs.save and 4 * shapes[0][0] <= KEPT_BYTES):
        shapes = (0,), (0,)
    return Kept(*(hidden.new_empty(shape, dtype=torch.float32) for shape in ((2, len(hidden)), *shapes)))


def forward(inputs: Inputs) -> Results:
    """As `torch.forward`."""
    head, targets, rows, *_ = inputs
    predicted = predictions_of(head.hidden, targets, inputs.predict)
    results = Results(torch.empty(targets.shape[0]), room(inputs), *predicted)
    _forward_into(results, *dense_head(head), targets.contiguous(), rows.contiguous())
    return results


def _forward_into(results: Results, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor) -> None:
    losses, kept, best, rank = results
    torch.ops.teracon_fast.linear_cross_entropy_cpu_forward(
        hidden, weight, bias, targets, rows, *schedule(weight.shape[0]), losses, *kept, best, rank
    )


def backward(backward: Backward) -> Gradients:
    """As `torch.backward`."""
    grad, inputs, kept, need_hidden, need_weight = backward
    hidden, weight, bias = inputs.head
    d_hidden = torch.empty(hidden.shape if need_hidden else 0)
    d_weight = torch.empty(weight.shape if need_weight else 0, dtype=weight.dtype)
    d_bias = torch.empty(bias.shape)
    torch.ops.teracon_fast.linear_cross_entropy_cpu_backward(
        *dense_head(inputs.head), inputs.targets.contiguous(), inputs.rows.contiguous(), *schedule(weight.shape[0]), *kept,
        grad.float().contiguous(), False, inputs.filter_eps, d_hidden, d_weight, d_bias,
    )  # fmt: skip
    return Gradients(Head(d_hidden.to(hidden.dtype), d_weight, d_bias.to(bias.dtype)))


def rows_at_once(rows: int, labels: int, hidden: torch.dtype, weight: torch.dtype) -> int | None:
    """Rows whose loss and gradients `reduced` computes together; None where keeping or recomputing all logits is faster.

    Args:
        rows, labels: R, C.
        hidden, weight: dtypes. Several chunks add to d(weight), which needs float32.
    """
    if rows == 0 or 4 * _kept_shapes(rows, labels)[0][0] <= KEPT_BYTES:
        return None
    at_once = max(KEPT_BYTES // (4 * labels), min(_MOST_ROWS, TURN_BYTES // (4 * labels))) // 32 * 32
    if at_once >= rows:
        return rows
    return at_once if at_once >= _FEWEST_ROWS[hidden] and weight == torch.float32 else None


def reduced(inputs: ReducedInputs) -> Reduced:
    """Chunks of rows, whose exponentials serve loss and gradients: logits are computed once, and never all held."""
    head, targets, rows, scales, filter_eps, _, predict = inputs
    count, labels = head.hidden.shape[0], head.weight.shape[0]
    at_once = rows_at_once(count, labels, head.hidden.dtype, head.weight.dtype)
    assert at_once is not None
    states, weight, bias = dense_head(head)
    d_hidden, d_weight, d_bias = torch.empty(states.shape), torch.empty_like(weight), torch.empty(bias.shape)
    best, rank = predictions_of(states, targets, predict)
    rows, order = rows.sort(stable=True)
    targets, scales = targets[order], scales[order].float()
    begins = range(0, count, at_once)
    ends = torch.searchsorted(rows, torch.tensor([begin + at_once for begin in begins])).tolist()
    total, from_target = torch.zeros((), dtype=torch.float64), 0
    # One array for all chunks: fresh memory costs a good part of what keeping the exponentials saves.
    memory = [torch.empty(math.prod(shape)) for shape in _kept_shapes(at_once, labels)]
    for begin, end in zip(begins, ends, strict=True):
        turn, own, row_of = slice(begin, begin + at_once), targets[from_target:end], rows[from_target:end] - begin
        part, scale = states[turn], scales[from_target:end]
        shapes = _kept_shapes(part.shape[0], labels)
        kept = Kept(
            torch.empty(2, len(part)), *(m[: math.prod(shape)] for m, shape in zip(memory, shapes, strict=True))
        )
        results = Results(torch.empty(len(own)), kept, *predictions_of(part, own, predict))
        _forward_into(results, part, weight, bias, own, row_of)
        torch.ops.teracon_fast.linear_cross_entropy_cpu_backward(
            part, weight, bias, own, row_of, *schedule(labels), *kept, scale, begin > 0, filter_eps, d_hidden[turn], d_weight,
            d_bias,
        )  # fmt: skip
        total += torch.dot(results.losses.double(), scale.double())
        if predict:
            best[turn] = results.best
            rank[order[from_target:end]] = results.rank
        from_target = end
    return Reduced(total.float(), Head(d_hidden.to(head.hidden.dtype), d_weight, d_bias.to(head.bias.dtype)), best, rank)
