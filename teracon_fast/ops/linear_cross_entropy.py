"""Cross-entropy of a linear head, where many targets may share one row of hidden states."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from teracon_fast.errors import ShapeError


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy of `hidden @ weight.T + bias` over all targets (Eq. 18; task 1: every position).

    Equal rows need one row of logits:
    `sum_n ce(row(n), target(n)) = sum_r count_r * logsumexp_r - sum_n logit[row(n), target(n)]`.

    Args:
        hidden: `[R, f]`. weight: `[C, f]`. bias: `[C]`.
        targets: int64 `[N]`, labels in 0..C-1.
        rows: int64 `[N]`, row of `hidden` that each target belongs to; None when N = R and target n belongs to row n.

    Raises:
        ShapeError: when shapes do not fit.
    """
    if hidden.dim() != 2 or weight.shape != (bias.shape[0], hidden.shape[1]):
        raise ShapeError(
            f"linear_cross_entropy: hidden {list(hidden.shape)}, weight {list(weight.shape)}, bias {list(bias.shape)}; "
            "expected [R, f], [C, f], [C]"
        )
    if rows is None:
        if targets.shape != hidden.shape[:1]:
            raise ShapeError(f"linear_cross_entropy: targets are {list(targets.shape)}, expected [{hidden.shape[0]}]")
        return F.cross_entropy(F.linear(hidden, weight, bias), targets)
    if rows.shape != targets.shape or targets.dim() != 1:
        raise ShapeError(f"linear_cross_entropy: rows are {list(rows.shape)}, targets {list(targets.shape)}, expected [N]")
    return _SharedRows.apply(F.linear(hidden, weight, bias), targets, rows)  # type: ignore[no-any-return, no-untyped-call]


class _SharedRows(torch.autograd.Function):
    """Mean cross-entropy of logits `[R, C]` with several targets per row: one dense gradient, written once."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
        wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        normaliser = torch.logsumexp(wide, 1)
        counts = torch.bincount(rows, minlength=logits.shape[0]).to(wide.dtype)
        ctx.save_for_backward(logits, normaliser, counts, targets, rows)
        return ((counts * normaliser).sum() - wide[rows, targets].sum()) / targets.shape[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, normaliser, counts, targets, rows = ctx.saved_tensors
        probability = (logits - normaliser[:, None]).exp_()
        probability *= counts[:, None]
        one = probability.new_ones(()).expand(targets.shape)
        probability.index_put_((rows, targets), -one, accumulate=True)
        probability *= grad / targets.shape[0]
        return probability.to(logits.dtype), None, None
