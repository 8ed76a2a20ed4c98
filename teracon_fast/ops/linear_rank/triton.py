"""`linear_rank` and `linear_topk` by Triton kernels. The `triton` backend."""

from __future__ import annotations

import torch
from torch import Tensor

from teracon_fast.ops.heads import require_range
from teracon_fast.ops.linear_rank.torch import require_no_nan


def rank(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
    """Ranks int64 `[N]`."""
    from teracon_fast.kernels import linear_rank as kernels
    from teracon_fast.kernels.tiles import dot_precision

    require_range("linear_rank", targets, weight.shape[0], "targets")
    require_range("linear_rank", rows, hidden.shape[0], "rows")
    ranks = kernels.rank(hidden, weight, bias, targets, rows, dot_precision(hidden.device))
    require_no_nan("linear_rank", (ranks >= weight.shape[0]).any())
    return ranks


def topk(hidden: Tensor, weight: Tensor, bias: Tensor, k: int, excluded: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """As `_torch_linear_rank.topk`; scores are float32."""
    from teracon_fast.kernels import linear_rank as kernels
    from teracon_fast.kernels.tiles import dot_precision

    require_range("linear_topk", excluded, weight.shape[0], "exclude")
    if not len(offsets):
        offsets = torch.zeros(hidden.shape[0] + 1, dtype=torch.int64, device=hidden.device)
    return kernels.topk(hidden, weight, bias, k, excluded, offsets, dot_precision(hidden.device))
