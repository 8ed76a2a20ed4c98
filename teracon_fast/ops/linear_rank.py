"""Ranking with a linear head: exact ranks and exact top-k, holding the logits of one block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from teracon_fast.errors import ShapeError

_BLOCK_BYTES = 64 << 20


def _blocks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    step = max(1, _BLOCK_BYTES // (weight.shape[0] * hidden.element_size()))
    for low in range(0, hidden.shape[0], step):
        yield slice(low, min(low + step, hidden.shape[0]))


@torch.no_grad()
def linear_rank(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Rank of each target among all labels, 0 the best: labels with a higher score, plus equal ones at a lower index.

    Args:
        hidden: `[N, f]`. weight: `[C, f]`. bias: `[C]`. targets: int64 `[N]`.

    Returns:
        int64 `[N]`.
    """
    if targets.shape != hidden.shape[:1]:
        raise ShapeError(f"linear_rank: targets are {list(targets.shape)}, expected [{hidden.shape[0]}]")
    ranks = torch.empty_like(targets)
    labels = torch.arange(weight.shape[0], device=hidden.device)
    for part in _blocks(hidden, weight):
        scores = F.linear(hidden[part], weight, bias)
        target = targets[part, None]
        own = scores.gather(1, target)
        above = (scores > own).sum(1)
        ties = scores == own
        # Ties besides the target itself are rare; only then does their order matter.
        if bool((ties.sum(1) > 1).any()):
            above += (ties & (labels < target)).sum(1)
        ranks[part] = above
    return ranks


@torch.no_grad()
def linear_topk(
    hidden: Tensor, weight: Tensor, bias: Tensor, k: int, exclude: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The k best labels of each row, best first; among equal scores the lower label comes first.

    Args:
        hidden: `[N, f]`. weight: `[C, f]`. bias: `[C]`.
        k: 1..C.
        exclude: per row an int64 tensor of labels that must not be returned (such as items already seen), or None. Where
            fewer than k labels remain, the rest have score -inf and label -1.

    Returns:
        scores `[N, k]` and labels int64 `[N, k]`.
    """
    if not 1 <= k <= weight.shape[0]:
        raise ShapeError(f"linear_topk: k is {k}, expected 1..{weight.shape[0]}")
    if exclude is not None and len(exclude) != hidden.shape[0]:
        raise ShapeError(f"linear_topk: exclude has {len(exclude)} rows, expected {hidden.shape[0]}")
    all_scores = hidden.new_empty(hidden.shape[0], k)
    all_labels = torch.empty(hidden.shape[0], k, dtype=torch.int64, device=hidden.device)
    for part in _blocks(hidden, weight):
        scores = F.linear(hidden[part], weight, bias)
        if exclude is not None:
            for row, labels in enumerate(exclude[part]):
                scores[row, labels] = -torch.inf
        best, chosen = _stable_topk(scores, k)
        all_scores[part] = best
        all_labels[part] = torch.where(torch.isneginf(best), -1, chosen)
    return all_scores, all_labels


def _stable_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """topk promises no order among equal scores, so rows where a tie reaches the k-th place are sorted in full."""
    wider = min(k + 1, scores.shape[1])
    best, labels = scores.topk(wider, dim=1)
    order = labels.argsort(dim=1, stable=True)
    best, labels = best.gather(1, order), labels.gather(1, order)
    best, order = best.sort(dim=1, descending=True, stable=True)
    labels = labels.gather(1, order)
    if wider > k:
        tied = best[:, k - 1] == best[:, k]
        if bool(tied.any()):
            full, order = scores[tied].sort(dim=1, descending=True, stable=True)
            best[tied], labels[tied] = full[:, :wider], order[:, :wider]
    return best[:, :k], labels[:, :k]
