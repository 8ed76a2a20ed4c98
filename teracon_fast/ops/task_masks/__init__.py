"""Output masks of tasks at every site, and what a training step derives from them."""

from teracon_fast.ops.task_masks.api import (
    MaskParameters,
    MaskVariant,
    StepMasks,
    check_variant,
    relation_width,
    step_masks,
    task_masks,
)
from teracon_fast.ops.task_masks.torch import of_tasks, plain_masks, rho, similarity

__all__ = [
    "MaskParameters", "MaskVariant", "StepMasks", "check_variant", "of_tasks", "plain_masks", "relation_width", "rho",
    "similarity", "step_masks", "task_masks",
]  # fmt: skip
