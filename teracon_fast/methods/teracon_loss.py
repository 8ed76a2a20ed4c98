"""TERACON's loss of a step from the states of its users: shared by the steps that run and those that are replayed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teracon_fast import ops
from teracon_fast.model.fast_tcn import FastTCN, Request


def step_states(
    model: FastTCN, teacher: FastTCN, x: Tensor, users: Sequence[Tensor], masks: Tensor, teacher_masks: Tensor,
    one_mask: bool, lengths: NDArray[np.int64],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """States of all users under the current mask; for each past task the student's and the teacher's of its users.

    Args:
        model: student of all tasks. teacher: of the tasks before, frozen.
        x: int64 `[B, L]`.
        users: for each past task the rows of x drawn for it, int64 `[n_j]`.
        masks: `[S, T, f]`. teacher_masks: `[S, T - 1, f]`.
        one_mask: whether the student is under the current task's mask for all of them (Eq. 16), else under the past task's.
        lengths: real lengths int64 `[B]`.
    """
    current = model.num_tasks - 1

    def requests(one_mask: bool) -> list[Request]:
        # Task 1 predicts the last item of a sequence, so it must not see it.
        return [Request(current if one_mask else j, rows, int(j == 0)) for j, rows in enumerate(users)]

    with torch.no_grad():
        pseudo = teacher.encode(x, requests(False), masks=teacher_masks, lengths=lengths)
    hidden, *student = model.encode(x, [Request(current), *requests(one_mask)], masks=masks, lengths=lengths)
    return hidden, student, pseudo


def loss_of_states(
    model: FastTCN, teacher: FastTCN, hidden: Tensor, student: Sequence[Tensor], pseudo: Sequence[Tensor], y: Tensor,
    rho: Sequence[float] | Tensor, alpha: float, predictions: bool, low_rank: bool = False, valid: Tensor | None = None,
) -> tuple[Tensor, ops.CrossEntropy, Tensor]:  # fmt: skip
    """The loss of a step (Eq. 18), that of the class in it, and that of retention times alpha (or 1, where alpha is 0).

    Args:
        hidden: `[B, f]`, states under the current mask. y: int64 `[B]`.
        student, pseudo: for each past task the student's and the teacher's states of its users, `[n_j, f]`.
        rho, valid, low_rank: as `ops.retention_mse`, the last its `low_rank_gradients`.
    """
    found = model.class_loss(hidden, model.num_tasks - 1, y, predictions)
    heads, its_heads = ([m.head(j) for j in range(teacher.num_tasks)] for m in (model, teacher))
    # alpha is part of the loss: it is formed with its gradients.
    retention = ops.retention_mse(
        student, [head.weight for head in heads], [head.bias for head in heads],
        pseudo, [head.weight for head in its_heads], [head.bias for head in its_heads],
        rho, scale=alpha or 1.0, low_rank_gradients=low_rank, valid=valid, backend=model.backend,
    )  # fmt: skip
    return found.loss + retention if alpha else found.loss, found, retention
