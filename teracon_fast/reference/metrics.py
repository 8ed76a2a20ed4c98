"""Ranks of the targets among all labels, and metrics of the ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from teracon_fast.errors import ShapeError, TeraconError


def target_rank(scores: Tensor, target: Tensor) -> Tensor:
    """Rank of each target among all labels, from 0: strictly higher scores, plus equal scores at a lower index.

    Args:
        scores: [N, C]. target: int64 [N].

    Returns:
        int64 [N].

    Raises:
        ShapeError: shapes do not match. TeraconError: a score is NaN, so that ranks are undefined.
    """
    if scores.dim() != 2 or target.shape != scores.shape[:1]:
        raise ShapeError(f"target_rank: got {list(scores.shape)} and {list(target.shape)}, expected [N, C] and [N]")
    if scores.isnan().any():
        raise TeraconError(f"target_rank: {int(scores.isnan().sum())} of {scores.numel()} scores are NaN")
    own = scores.gather(1, target.unsqueeze(1))
    before = torch.arange(scores.shape[1], device=scores.device) < target.unsqueeze(1)
    return ((scores > own) | ((scores == own) & before)).sum(dim=1)


def top_labels(scores: Tensor, k: int, exclude: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The k best labels of each row, best first, ties by ascending label.

    Args:
        scores: [N, C]. k: 1..C.
        exclude: for each row the labels to leave out, int64 [any].

    Returns:
        scores [N, k] and labels int64 [N, k]; label -1 where the score is -inf, as for excluded labels.
    """
    scores = scores.clone()
    for row, labels in enumerate(exclude or ()):
        scores[row, labels] = -torch.inf
    best, labels = scores.sort(dim=1, descending=True, stable=True)
    return best[:, :k], torch.where(best == -torch.inf, -1, labels)[:, :k]


def hit_at(rank: Tensor, k: int) -> float:
    """Share of the targets among the first k."""
    return (rank < k).double().mean().item()


def mrr_at(rank: Tensor, k: int) -> float:
    """Mean of 1 / (rank + 1), 0 beyond the first k."""
    return torch.where(rank < k, 1.0 / (rank + 1).double(), 0.0).mean().item()


def ndcg_at(rank: Tensor, k: int) -> float:
    """Mean of 1 / log2(rank + 2), 0 beyond the first k; the ideal gain is 1 with one target per sample."""
    return torch.where(rank < k, 1.0 / torch.log2((rank + 2).double()), 0.0).mean().item()


def accuracy(rank: Tensor) -> float:
    """Share of the targets ranked first: hit@1."""
    return hit_at(rank, 1)
