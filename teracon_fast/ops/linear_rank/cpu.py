"""`linear_rank` and `linear_topk` by the compiled C++ kernels, for float32 and bfloat16 on the CPU. The `cpu` backend."""

from __future__ import annotations

import torch

from teracon_fast.ops.heads import dense_head, schedule
from teracon_fast.ops.linear_rank.api import RankInputs, Ranks, Topk, TopkInputs
from teracon_fast.ops.linear_rank.torch import require_no_nan

# The best labels that threads hold of all rows at once, each 8 bytes.
_HELD_BYTES = 64 << 20


def rank(inputs: RankInputs) -> Ranks:
    """As `ops.linear_rank`."""
    head, targets, rows, _ = inputs
    ranks = torch.empty(targets.shape[0], dtype=torch.int64)
    nan = torch.ops.teracon_fast.linear_rank_cpu(
        *dense_head(head), targets.contiguous(), rows.contiguous(), *schedule(len(head.weight)), ranks
    )
    require_no_nan("linear_rank", nan)
    return Ranks(ranks)


def topk(inputs: TopkInputs) -> Topk:
    """As `torch.topk`; scores are float32."""
    head, k, excluded, offsets, _ = inputs
    hidden, weight, bias = dense_head(head)
    scores, labels = torch.empty(hidden.shape[0], k), torch.empty(hidden.shape[0], k, dtype=torch.int64)
    step = max(1, _HELD_BYTES // (8 * k * torch.get_num_threads()))
    for low in range(0, hidden.shape[0], step):
        part = slice(low, low + step)
        left_out, own = excluded, offsets
        if len(offsets):
            own = offsets[low : low + step + 1]
            left_out, own = excluded[own[0] : own[-1]], own - own[0]
        nan = torch.ops.teracon_fast.linear_topk_cpu(
            hidden[part], weight, bias, left_out, own, *schedule(weight.shape[0]), scores[part], labels[part]
        )
        require_no_nan("linear_topk", nan)
    return Topk(scores, labels)
