"""`task_masks` by the formulas of `model.masks`, with autograd's gradients: any device, any floating dtype. The `torch`
backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from teracon_fast.model import masks

if TYPE_CHECKING:
    from teracon_fast.ops.task_masks import MaskParameters


def task_masks(parameters: MaskParameters, s: float | Tensor, tasks: tuple[int, ...]) -> Tensor:
    """`[S, n, f]`; weights and biases, where there are any, are those of `tasks`."""
    embeddings, weights, biases, variant = parameters
    if weights is None or biases is None:
        return masks.plain_masks(masks.of_tasks(embeddings, tasks), s)
    return masks.relation_masks(embeddings, weights, biases, s, variant, tasks)


def step_masks(
    student: MaskParameters, teacher: MaskParameters, s: float | Tensor, c: float, current: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The student's masks `[S, T, f]`; without gradient the teacher's `[S, J, f]` and rho `[J]`."""
    own = task_masks(student, s, tuple(range(student.embeddings.shape[1])))
    with torch.no_grad():
        teachers = task_masks(teacher, s, tuple(range(teacher.embeddings.shape[1])))
        return own, teachers, masks.rho(teachers, own[:, current].detach(), c)
