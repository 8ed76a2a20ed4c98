"""Rows of an embedding, with a gradient that may be sparse: no dense matrix for the few rows of a batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from teracon_fast.errors import ShapeError
from teracon_fast.ops.embedding_rows.late_rows import catch_up


def embedding_rows(weight: Tensor, items: Tensor, sparse: bool = False) -> Tensor:
    """`weight[items]`, differentiable with respect to `weight`.

    With `sparse` the gradient is a `torch.sparse_coo` tensor: the items of the batch, each once and ascending, with the sums
    of their rows in the order of occurrence. On the CPU these are the bits of the dense gradient. Optimizers that take it:
    `teracon_fast.optim.Adam`, torch's SGD, Adagrad and SparseAdam; `DistributedDataParallel` does not. PyTorch drops the flag
    "coalesced" when it fills `.grad`; rows are still unique and ascending there.

    On a GPU the number of different items is unknown without waiting, so the sums are left to the optimizer: the gradient is not
    coalesced, and consists of `items` and the upstream gradient themselves, which must not be modified before it is used.

    Rows of a weight that `optim.Adam(lazy=True)` has not updated yet are brought up to date first, in place, as by `Adam.flush`.

    `torch.compile` traces no sparse gradients: in compiled code the gradient is dense whatever `sparse` says, and no row is
    brought up to date (`Adam.flush` does so before).

    Args:
        weight: `[V, f]`, floating. The gradient has its dtype; in less than float32, sums are taken in float32.
        items: int64 or int32 `[n]`, rows of `weight`.
        sparse: whether the gradient is sparse.

    Returns:
        `[n, f]`.

    Raises:
        ShapeError: for other shapes or dtypes. IndexError: an item is not in 0..V-1.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ShapeError(f"embedding_rows: weight is {weight.dtype} {list(weight.shape)}, expected a floating [V, f]")
    if items.dim() != 1 or items.dtype not in (torch.int64, torch.int32):
        raise ShapeError(f"embedding_rows: items are {items.dtype} {list(items.shape)}, expected int64 [n]")
    if torch.compiler.is_compiling():
        return F.embedding(items, weight)
    catch_up(weight, items)
    if sparse:
        rows: Tensor = _RowsWithSparseGradient.apply(weight, items)
        return rows
    return F.embedding(items, weight)


def sum_rows(items: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the rows of each item, in the order of occurrence.

    Args:
        items: int64 `[n]`, in any order.
        rows: `[n, f]`, floating, of any layout.

    Returns:
        The different items, ascending, int64 `[m]`; the sums `[m, f]` in the dtype of `rows`, taken in float32 at least.
    """
    ordered, order = torch.sort(items, stable=True)
    different, counts = torch.unique_consecutive(ordered, return_counts=True)
    exact = rows if rows.dtype == torch.float64 else rows.float()
    # Adds the rows of a bag in the order given, bags in parallel.
    sums = F.embedding_bag(order, exact.contiguous(), counts.cumsum(0) - counts, mode="sum")
    return different, sums.to(rows.dtype)


class _RowsWithSparseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, items: Tensor) -> Tensor:
        ctx.save_for_backward(items)
        ctx.shape = weight.shape
        return F.embedding(items, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        items, summed = ctx.saved_tensors[0].long(), not _leaves_sums(grad)
        rows, values = sum_rows(items, grad) if summed else (items, grad)
        # Forward has read these rows, so they are in range; a check would wait for the device.
        gradient = torch.sparse_coo_tensor(rows[None], values, ctx.shape, check_invariants=False, is_coalesced=summed)
        return gradient, None


def _leaves_sums(grad: Tensor) -> bool:
    """Whether summing the rows of each item is left to the optimizer: their number is known on the device only."""
    return grad.device.type != "cpu"
