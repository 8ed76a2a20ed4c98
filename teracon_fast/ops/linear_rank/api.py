"""Ranking with a linear head: exact ranks and exact top-k. The compiled kernels never hold a [rows, labels] matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from teracon_fast.errors import ShapeError
from teracon_fast.ops import backends
from teracon_fast.ops.heads import autocast_hidden, check_head, check_targets, expect, sums_dtype
from teracon_fast.ops.linear_rank import cpu as _cpu_linear_rank
from teracon_fast.ops.linear_rank import torch as _torch_linear_rank
from teracon_fast.ops.linear_rank import triton as _triton_linear_rank


class _Implementation(Protocol):
    """What a backend's module offers: see `_torch_linear_rank` for the meaning of the arguments."""

    def rank(self, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor) -> Tensor: ...

    def topk(
        self, hidden: Tensor, weight: Tensor, bias: Tensor, k: int, excluded: Tensor, offsets: Tensor
    ) -> tuple[Tensor, Tensor]: ...


_IMPLEMENTATIONS: dict[str, _Implementation] = {
    "cpu": _cpu_linear_rank, "torch": _torch_linear_rank, "triton": _triton_linear_rank
}  # fmt: skip


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
    hidden = autocast_hidden(hidden)
    check_head("linear_rank", hidden, weight, bias)
    check_targets("linear_rank", hidden, targets, rows)
    rows = torch.arange(hidden.shape[0], device=hidden.device) if rows is None else rows
    ranks: Tensor = _linear_rank(hidden, weight, bias, targets, rows, backend)
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
    hidden = autocast_hidden(hidden)
    check_head("linear_topk", hidden, weight, bias)
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
    scores, labels = _linear_topk(hidden, weight, bias, k, excluded, offsets, backend)
    return scores, labels


def _implementation(backend: str, hidden: Tensor) -> _Implementation:
    return _IMPLEMENTATIONS[backends.resolve(backend, "linear_rank", hidden.device, hidden.dtype)]


def _rank(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, backend: str) -> Tensor:
    return _implementation(backend, hidden).rank(hidden, weight, bias, targets, rows)


def _rank_fake(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, backend: str) -> Tensor:
    return torch.empty_like(targets)


def _topk(
    hidden: Tensor, weight: Tensor, bias: Tensor, k: int, excluded: Tensor, offsets: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    scores, labels = _implementation(backend, hidden).topk(hidden, weight, bias, k, excluded, offsets)
    return scores.to(sums_dtype(hidden.dtype)), labels


def _topk_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor, k: int, excluded: Tensor, offsets: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    shape = (hidden.shape[0], k)
    return hidden.new_empty(shape, dtype=sums_dtype(hidden.dtype)), excluded.new_empty(shape)


for _name, _function, _fake in (
    ("teracon_fast::linear_rank", _rank, _rank_fake), ("teracon_fast::linear_topk", _topk, _topk_fake)
):  # fmt: skip
    torch.library.define(_name, torch.library.infer_schema(_function, mutates_args=()))
    torch.library.impl(_name, "default", _function)
    torch.library.register_fake(_name, _fake)
_linear_rank = torch.ops.teracon_fast.linear_rank.default
_linear_topk = torch.ops.teracon_fast.linear_topk.default
