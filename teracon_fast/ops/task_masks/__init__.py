"""Output masks of tasks at every site, and what a training step derives from them: the teacher"s masks and sampling rates."""

from teracon_fast.ops.task_masks.api import MaskParameters, StepMasks, step_masks, task_masks

__all__ = ["MaskParameters", "StepMasks", "step_masks", "task_masks"]
