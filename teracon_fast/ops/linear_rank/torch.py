"""`linear_rank` and `linear_topk` in plain PyTorch operations, some rows at a time: any device, any floating dtype."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from teracon_fast.errors import TeraconError
from teracon_fast.ops.checks import require_range
from teracon_fast.ops.heads import Head
from teracon_fast.ops.linear_rank.api import RankInputs, Ranks, Topk, TopkInputs

_BLOCK_BYTES = 64 << 20


def _blocks(rows: int, weight: Tensor) -> Iterator[slice]:
    step = max(1, _BLOCK_BYTES // (weight.shape[0] * weight.element_size()))
    for low in range(0, rows, step):
        yield slice(low, min(low + step, rows))


def _scores(operation: str, head: Head, part: slice) -> Tensor:
    hidden, weight, bias = head.hidden[part], head.weight, head.bias
    scores = F.linear(hidden, weight.to(hidden.dtype), bias.to(hidden.dtype))
    require_no_nan(operation, scores.isnan().any())
    return scores


def require_no_nan(operation: str, found: Tensor | bool) -> None:
    """Raise TeraconError if a score is NaN and cannot be ranked. On a GPU, without a wait, an assertion on the device fails."""
    if isinstance(found, Tensor) and found.device.type != "cpu":
        torch._assert_async(~found)
    elif found:
        raise TeraconError(f"{operation}: got scores that are NaN, expected numbers: has the model diverged?")


def ranks_among(logits: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
    """Rank of each target among the logits `[R, C]` of its row, int64 `[N]`; those that are NaN count as higher."""
    own = logits[rows, targets]
    rank = torch.empty_like(targets)
    labels = torch.arange(logits.shape[1], device=logits.device)
    for part in _blocks(len(targets), logits.t()):
        scores, mine, target = logits[rows[part]], own[part, None], targets[part, None]
        ties = scores == mine
        above = (~(scores <= mine)).sum(1)
        # Only with ties beyond the target itself, which are rare, does their order matter.
        if logits.device.type != "cpu" or bool((ties.sum(1) > 1).any()):
            above += (ties & (labels < target)).sum(1)
        rank[part] = above
    return rank


def rank(inputs: RankInputs) -> Ranks:
    """As `ops.linear_rank`."""
    head, targets, rows, _ = inputs
    require_range("linear_rank", targets, len(head.weight), "targets")
    require_range("linear_rank", rows, len(head.hidden), "rows")
    order = rows.argsort(stable=True)
    sorted_rows, ranks = rows[order], torch.empty_like(targets)
    for part in _blocks(len(head.hidden), head.weight):
        scores = _scores("linear_rank", head, part)
        low, high = torch.searchsorted(sorted_rows, torch.tensor([part.start, part.stop], device=rows.device)).tolist()
        own = order[low:high]
        ranks[own] = ranks_among(scores, targets[own], rows[own] - part.start)
    return Ranks(ranks)


def topk(inputs: TopkInputs) -> Topk:
    """Scores and labels, `[R, k]`."""
    head, k, excluded, offsets, _ = inputs
    hidden, count = head.hidden, len(head.hidden)
    require_range("linear_topk", excluded, len(head.weight), "exclude")
    all_scores = hidden.new_empty(count, k)
    all_labels = torch.empty(count, k, dtype=torch.int64, device=hidden.device)
    of_row = torch.repeat_interleave(torch.arange(count, device=hidden.device), offsets.diff()) if len(offsets) else excluded
    for part in _blocks(count, head.weight):
        scores = _scores("linear_topk", head, part)
        inside = (of_row >= part.start) & (of_row < part.stop)
        scores[of_row[inside] - part.start, excluded[inside]] = -torch.inf
        best, chosen = _stable_topk(scores, k)
        all_scores[part], all_labels[part] = best, torch.where(torch.isneginf(best), -1, chosen)
    return Topk(all_scores, all_labels)


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
