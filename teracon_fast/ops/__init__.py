"""Operations of the fast path. Each checks its input, is differentiable, and dispatches to a backend."""

from teracon_fast.ops.embedding_rows import embedding_rows
from teracon_fast.ops.heads import unit_gradient
from teracon_fast.ops.linear_cross_entropy import CrossEntropy, linear_cross_entropy
from teracon_fast.ops.linear_rank import linear_rank, linear_topk
from teracon_fast.ops.masked_conv import ALGORITHMS, masked_conv
from teracon_fast.ops.pack import pack
from teracon_fast.ops.packed_conv import packed_conv
from teracon_fast.ops.retention_mse import retention_mse
from teracon_fast.ops.rows import gather_rows
from teracon_fast.ops.task_masks import MaskParameters, StepMasks, step_masks, task_masks

__all__ = [
    "ALGORITHMS", "CrossEntropy", "MaskParameters", "StepMasks", "embedding_rows", "gather_rows", "linear_cross_entropy",
    "linear_rank", "linear_topk", "masked_conv", "pack", "packed_conv", "retention_mse", "step_masks", "task_masks",
    "unit_gradient",
]  # fmt: skip
