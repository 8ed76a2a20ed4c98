"""Ranking with a linear head: exact ranks and exact top-k. The compiled kernels never hold a [rows, labels] matrix."""

from teracon_fast.ops.linear_rank.api import linear_rank, linear_topk

__all__ = ["linear_rank", "linear_topk"]
