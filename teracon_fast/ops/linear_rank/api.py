"""Ranking with a linear head: exact ranks and exact top-k. The compiled kernels never hold a [rows, labels] matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from teracon_fast.errors import ShapeError
from teracon_fast.ops.checks import autocast, expect, sums_dtype
from teracon_fast.ops.heads import Head, check_head, check_targets
from teracon_fast.ops.registration import flat, implementation, register


class RankInputs(NamedTuple):
    """Arguments of `linear_rank`."""

    head: Head
    targets: Tensor
    rows: Tensor
    backend: str


class Ranks(NamedTuple):
    """int64 `[N]`."""

    ranks: Tensor


class TopkInputs(NamedTuple):
    """Arguments of `linear_topk`; excluded labels of row r are `excluded[offsets[r]:offsets[r + 1]]`; no offsets, none."""

    head: Head
    k: int
    excluded: Tensor
    offsets: Tensor
    backend: str


class Topk(NamedTuple):
    """`[R, k]` each."""

    scores: Tensor
    labels: Tensor


@torch.no_grad()
def linear_rank(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """Rank of each target among all labels, 0 the best: labels with a higher score, plus equal ones at a lower index.

    Scores are `hidden @ weight.T + bias`. With hidden states in bfloat16, weights are rounded to it where they are used.

    Args:
        hidden: floating `[R, f]`.
        weight: `[C, f]`, of the dtype of `hidden`, or float32 where that is a half precision. bias: `[C]`, as `weight`.
        targets: int64 `[N]`, labels in 0..C-1.
        rows: int64 `[N]`, row of `hidden` that each target belongs to, any number per row: several labels of one user share the
            pass. None when N = R and target n belongs to row n.
        backend: "auto", "torch", or another that `teracon_fast.env_report()` lists as available.

    Returns:
        int64 `[N]`.

    Raises:
        ShapeError: when shapes, dtypes or devices do not fit.
        BackendError: when an explicitly requested backend is not available for this input.
        IndexError or RuntimeError: when a target or a row number is out of range.
        TeraconError: a score is NaN, so that no rank exists.
    """
    head = Head(autocast(hidden), weight, bias)
    check_head("linear_rank", head)
    rows = check_targets("linear_rank", head.hidden, targets, rows)
    ranks: Tensor = _linear_rank(*flat(RankInputs(head, targets, rows, backend)))
    return ranks


@torch.no_grad()
def linear_topk(
    hidden: Tensor, weight: Tensor, bias: Tensor, k: int, exclude: Sequence[Tensor] | None = None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The k best labels of each row, best first; among equal scores the lower label comes first.

    Args:
        hidden, weight, bias, backend: as `linear_rank`.
        k: 1..C.
        exclude: per row an int64 tensor of labels that must not be returned (such as items already seen), or None. Where fewer
            than k labels remain, the rest have score -inf and label -1; so has a label whose score is -inf.

    Returns:
        scores `[R, k]`, float32 where `hidden` is a half precision, else of its dtype; and labels int64 `[R, k]`.

    Raises:
        As `linear_rank`.
    """
    hidden = autocast(hidden)
    head = Head(hidden, weight, bias)
    check_head("linear_topk", head)
    if not 1 <= k <= weight.shape[0]:
        raise ShapeError(f"linear_topk: k is {k}, expected 1..{weight.shape[0]}")
    excluded = offsets = torch.empty(0, dtype=torch.int64, device=hidden.device)
    if exclude is not None:
        if len(exclude) != hidden.shape[0]:
            raise ShapeError(f"linear_topk: exclude has {len(exclude)} rows, expected {hidden.shape[0]}")
        for row, labels in enumerate(exclude):
            expect("linear_topk", f"exclude of row {row}", labels, (labels.numel(),), hidden, (torch.int64,))
        counts = torch.tensor([0, *(len(labels) for labels in exclude)], device=hidden.device)
        offsets = counts.cumsum(0)
        excluded = torch.cat([labels.sort().values for labels in exclude]) if len(exclude) else excluded
    scores, labels = _linear_topk(*flat(TopkInputs(head, k, excluded, offsets, backend)))
    return scores, labels


def _topk(inputs: TopkInputs) -> Topk:
    scores, labels = implementation("linear_rank", inputs).topk(inputs)
    return Topk(scores.to(sums_dtype(inputs.head.hidden.dtype)), labels)


def _topk_fake(inputs: TopkInputs) -> Topk:
    hidden, shape = inputs.head.hidden, (inputs.head.hidden.shape[0], inputs.k)
    return Topk(hidden.new_empty(shape, dtype=sums_dtype(hidden.dtype)), inputs.excluded.new_empty(shape))


_linear_rank = register(
    "linear_rank", RankInputs, Ranks, "linear_rank.rank", lambda inputs: Ranks(torch.empty_like(inputs.targets))
)
_linear_topk = register("linear_topk", TopkInputs, Topk, _topk, _topk_fake)
