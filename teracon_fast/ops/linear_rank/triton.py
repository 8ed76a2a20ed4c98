"""`linear_rank` and `linear_topk` by Triton kernels. The `triton` backend."""

from __future__ import annotations

import torch

from teracon_fast.kernels import linear_rank as kernels
from teracon_fast.kernels.tiles import dot_precision
from teracon_fast.ops.checks import require_range
from teracon_fast.ops.linear_rank.api import RankInputs, Ranks, Topk, TopkInputs
from teracon_fast.ops.linear_rank.torch import require_no_nan


def rank(inputs: RankInputs) -> Ranks:
    """As `ops.linear_rank`."""
    head, targets, rows, _ = inputs
    require_range("linear_rank", targets, len(head.weight), "targets")
    require_range("linear_rank", rows, len(head.hidden), "rows")
    ranks = kernels.rank(*head, targets, rows, dot_precision(head.hidden.device))
    require_no_nan("linear_rank", (ranks >= len(head.weight)).any())
    return Ranks(ranks)


def topk(inputs: TopkInputs) -> Topk:
    """As `torch.topk`; scores are float32."""
    head, k, excluded, offsets, _ = inputs
    require_range("linear_topk", excluded, len(head.weight), "exclude")
    if not len(offsets):
        offsets = torch.zeros(len(head.hidden) + 1, dtype=torch.int64, device=head.hidden.device)
    return Topk(*kernels.topk(*head, k, excluded, offsets, dot_precision(head.hidden.device)))
