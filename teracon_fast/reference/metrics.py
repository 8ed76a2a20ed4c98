"""Ranks of the targets among all labels, and the metrics counted from them, one row at a time in words."""

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
        ShapeError: shapes do not fit. TeraconError: a score is NaN (no rank exists, and none is counted as best).
    """
    if scores.dim() != 2 or target.shape != scores.shape[:1]:
        raise ShapeError(f"target_rank: got {list(scores.shape)} and {list(target.shape)}, expected [N, C] and [N]")
    if scores.isnan().any():
        raise TeraconError(f"target_rank: {int(scores.isnan().sum())} of {scores.numel()} scores are NaN")
    own = scores.gather(1, target.unsqueeze(1))
    before = torch.arange(scores.shape[1], device=scores.device) < target.unsqueeze(1)
    return ((scores > own) | ((scores == own) & before)).sum(dim=1)


def top_labels(scores: Tensor, k: int, exclude: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The k best labels of each row, best first, the lower label first among equal scores.

    Args:
        scores: [N, C]. k: 1..C.
        exclude: for each row the labels that are left out, int64 of any number.

    Returns:
        scores [N, k] and labels int64 [N, k]; where the score is -inf, as that of a label left out, the label is -1.
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
    """Mean of 1 / log2(rank + 2), 0 beyond the first k: with one target per sample the ideal gain is 1."""
    return torch.where(rank < k, 1.0 / torch.log2((rank + 2).double()), 0.0).mean().item()


def accuracy(rank: Tensor) -> float:
    """Share of the targets that come first, which is hit@1."""
    return hit_at(rank, 1)
