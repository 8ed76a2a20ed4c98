"""Knowledge retention: squared distance between the student's and the teacher's logits of every past task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from teracon_fast.errors import ShapeError

Head = tuple[Tensor, Tensor]


def retention_mse(
    student_hidden: Sequence[Tensor],
    student_heads: Sequence[Head],
    teacher_hidden: Sequence[Tensor],
    teacher_heads: Sequence[Head],
    rho: Tensor | Sequence[float],
) -> Tensor:
    """`sum_j rho_j / sum(rho) * mean((student logits_j - teacher logits_j)^2)`, mean over rows and labels (Eq. 16).

    Args:
        student_hidden, teacher_hidden: per past task `[n_j, f]`, the same users in the same order; n_j at least 1.
        student_heads, teacher_heads: per past task (weight `[C_j, f]`, bias `[C_j]`).
        rho: per past task, the rates that the users were drawn with.

    Returns:
        Scalar; differentiable with respect to the student's tensors. The teacher's logits carry no gradient.

    Raises:
        ShapeError: when the numbers of tasks or the shapes differ, or a task has no users.
    """
    counts = [len(part) for part in (student_hidden, student_heads, teacher_hidden, teacher_heads, rho)]
    if len(set(counts)) != 1 or not counts[0]:
        raise ShapeError(f"retention_mse: got {counts} past tasks, expected the same positive number of each argument")
    rates = torch.as_tensor(rho, device=student_hidden[0].device)
    shares = rates / rates.sum()
    total = student_hidden[0].new_zeros((), dtype=torch.promote_types(student_hidden[0].dtype, torch.float32))
    for j, (student, teacher) in enumerate(zip(student_hidden, teacher_hidden, strict=True)):
        if student.shape != teacher.shape or not len(student):
            raise ShapeError(
                f"retention_mse: past task {j} has student rows {list(student.shape)} and teacher rows "
                f"{list(teacher.shape)}, expected equal shapes with at least one row"
            )
        with torch.no_grad():
            target = F.linear(teacher, *teacher_heads[j])
        distance = F.mse_loss(F.linear(student, *student_heads[j]).to(total.dtype), target.to(total.dtype))
        total = total + shares[j].to(total.dtype) * distance
    return total
