"""`linear_cross_entropy` by the compiled C++ kernels: float32 and bfloat16 hidden states on the CPU. The `cpu` backend.

Labels are taken in blocks: the logits of some rows under a block stay in the cache. Arithmetic is float32 throughout.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Shape = tuple[int, ...]

# Backward is a third faster with the exponentials of all logits kept from forward. Beyond this size it forms them again: malloc
# gives larger memory back to the system every time, and getting it anew can cost more than the product.
KEPT_BYTES = 32 << 20
# Fewer rows than this at once do not pay for reading and writing d(weight) once more.
_FEWEST_ROWS = 128
# Labels in a block: a multiple of what every register tile covers. Their weights, two copies, fit a second-level cache.
_TILE, _BLOCK = 14, 126
# As many blocks as this, where there are labels enough, give many threads nearly equal shares.
_FEWEST_BLOCKS = 24


def _block(labels: int) -> int:
    """Never depends on the number of threads: forward and backward need not run with the same one."""
    return min(_BLOCK, -(-labels // (_FEWEST_BLOCKS * _TILE)) * _TILE)


def kept_shapes(rows: int, labels: int, save: bool) -> tuple[Shape, Shape]:
    """Shapes of what forward keeps for backward: exponentials, and the maxima that they refer to; see csrc/cpu."""
    padded = (rows + 31) // 32 * 32
    if not save or 4 * labels * padded > KEPT_BYTES:
        return (0,), (0,)
    return (labels * padded,), (-(-labels // _block(labels)), padded)


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_torch_linear_cross_entropy.forward`."""
    labels = weight.shape[0]
    exponentials, highest = (torch.empty(shape) for shape in kept_shapes(hidden.shape[0], labels, save))
    wide, wide_weight, wide_bias = _dense(hidden, weight, bias)
    losses, statistics = _forward_into(wide, wide_weight, wide_bias, targets, rows, exponentials, highest)
    return losses, statistics, exponentials, highest


def _forward_into(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, exponentials: Tensor, highest: Tensor
) -> tuple[Tensor, Tensor]:
    losses, statistics = torch.empty(targets.shape[0]), torch.empty(2, hidden.shape[0])
    torch.ops.teracon_fast.linear_cross_entropy_cpu_forward(
        hidden, weight, bias, targets.contiguous(), rows.contiguous(), _block(weight.shape[0]), torch.get_num_threads(),
        losses, statistics, exponentials, highest,
    )  # fmt: skip
    return losses, statistics


def backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, statistics: Tensor,
    exponentials: Tensor, highest: Tensor, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `_torch_linear_cross_entropy.backward`."""
    d_hidden = torch.empty(hidden.shape if need_hidden else 0)
    d_weight = torch.empty(weight.shape if need_weight else 0)
    d_bias = torch.empty(bias.shape)
    torch.ops.teracon_fast.linear_cross_entropy_cpu_backward(
        *_dense(hidden, weight, bias), targets.contiguous(), rows.contiguous(), _block(weight.shape[0]),
        torch.get_num_threads(), statistics, exponentials, highest, grad.contiguous(), False, d_hidden, d_weight, d_bias,
    )  # fmt: skip
    return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), d_bias.to(bias.dtype)


def rows_at_once(rows: int, labels: int) -> int | None:
    """Rows whose loss and gradients `reduced` forms together; None where something else is faster.

    All rows at once, where their exponentials may be kept, need no second walk over d(weight). A few rows at a time would
    walk over it too often.
    """
    at_once = KEPT_BYTES // (4 * labels) // 32 * 32
    return at_once if _FEWEST_ROWS <= at_once < rows else None


def reduced(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`scale` times the sum of the losses, and its gradients: exponentials of some rows serve both, and are gone.

    So the logits are formed once, without an array of all rows and labels.
    """
    at_once = rows_at_once(hidden.shape[0], weight.shape[0])
    assert at_once is not None
    wide, wide_weight, wide_bias = _dense(hidden, weight, bias)
    d_hidden, d_weight, d_bias = torch.empty(hidden.shape), torch.empty(weight.shape), torch.empty(bias.shape)
    rows, order = rows.sort(stable=True)
    targets = targets[order]
    begins = range(0, hidden.shape[0], at_once)
    ends = torch.searchsorted(rows, torch.tensor([begin + at_once for begin in begins])).tolist()
    total, from_target = torch.zeros((), dtype=torch.float64), 0
    # One array for all turns: fresh memory costs a good part of what keeping the exponentials saves.
    room = [torch.empty(math.prod(shape)) for shape in kept_shapes(at_once, weight.shape[0], True)]
    for begin, end in zip(begins, ends, strict=True):
        part, own, row_of = wide[begin : begin + at_once], targets[from_target:end], rows[from_target:end] - begin
        shapes = kept_shapes(part.shape[0], weight.shape[0], True)
        exponentials, highest = (array[: math.prod(shape)] for array, shape in zip(room, shapes, strict=True))
        losses, statistics = _forward_into(part, wide_weight, wide_bias, own, row_of, exponentials, highest)
        torch.ops.teracon_fast.linear_cross_entropy_cpu_backward(
            part, wide_weight, wide_bias, own, row_of, _block(weight.shape[0]), torch.get_num_threads(), statistics,
            exponentials, highest, torch.full_like(losses, scale), begin > 0, d_hidden[begin : begin + at_once], d_weight, d_bias,
        )  # fmt: skip
        total += losses.sum(dtype=torch.float64)
        from_target = end
    return (total * scale).float(), d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), d_bias.to(bias.dtype)


def _dense(*tensors: Tensor) -> list[Tensor]:
    return [tensor.float().contiguous() for tensor in tensors]
