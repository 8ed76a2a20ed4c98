"""Drawing users for retention, and one training step of task 1 or of a later task."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teracon_fast.errors import ConfigError, ShapeError
from teracon_fast.reference.losses import cross_entropy, retention_loss, rho
from teracon_fast.reference.model import ReferenceTCN

FIRST_RHO = 0.9  # of every past task in the first step of a task, before masks have been compared
E_LIMIT = 6.0


@dataclass(frozen=True)
class StepResult:
    """Result of one step of a later task: its losses, and the ratios for the next step."""

    class_loss: float
    retention_loss: float
    next_rho: list[float]


def sampling_ratios(rho: Sequence[float], sampling: str = "adaptive") -> list[float]:
    """The ratio with which users of each past task are drawn and weighted (Eq. 14 to 16, the paper's Table 6).

    "adaptive": rho; "minimum": the smallest rho for all tasks; "all": 1.
    """
    if sampling == "adaptive":
        return list(rho)
    if sampling == "minimum":
        return [min(rho)] * len(rho)
    if sampling == "all":
        return [1.0] * len(rho)
    raise ConfigError(f"sampling: got {sampling!r}, expected adaptive, minimum or all")


def sample_counts(batch: int, rho: Sequence[float], sampling: str = "adaptive") -> list[int]:
    """Eq. 14: n_j = int(batch * ratio_j), at least 1, since the mean squared error of no users is NaN."""
    return [max(1, int(batch * ratio)) for ratio in sampling_ratios(rho, sampling)]


def draw_users(
    batch: int, rho: Sequence[float], sampling: str = "adaptive", generator: torch.Generator | None = None
) -> list[Tensor]:
    """For each past task n_j distinct rows of the batch, int64 [n_j], uniform and independent of the other tasks."""
    return [torch.randperm(batch, generator=generator)[:n] for n in sample_counts(batch, rho, sampling)]


def frozen_copy(model: ReferenceTCN) -> ReferenceTCN:
    """The teacher: a copy without gradients."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def clamp_task_embeddings(model: ReferenceTCN, limit: float = E_LIMIT) -> None:
    """Clamp every e to [-limit, limit] in place, after every optimizer step."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ec." in name:
                parameter.clamp_(-limit, limit)


def next_item_loss(model: ReferenceTCN, x: Tensor, s: float) -> Tensor:
    """Task 1: cross-entropy of item p+1 given items up to p, at all L-1 positions, pads counted. x: int64 [B, L]."""
    logits, _ = model(x[:, :-1], s, [], 0)
    return cross_entropy(logits, x[:, 1:].flatten())


def t1_step(model: ReferenceTCN, optimizer: torch.optim.Optimizer, x: Tensor, s: float) -> float:
    """One training step of task 1; returns the loss. x: int64 [B, L], both input and target."""
    optimizer.zero_grad()
    loss = next_item_loss(model, x, s)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    clamp_task_embeddings(model)
    return loss.item()


def past_logits(model: ReferenceTCN, x: Tensor, past_task: int, masks: Tensor) -> Tensor:
    """G_j(M(x; m)) at the last position (Eq. 9). Task 1 predicts the last item, which is therefore dropped.

    Args:
        x: int64 [n_j, L]. masks: [S, f].

    Returns:
        [n_j, C_j].
    """
    seen = x[:, :-1] if past_task == 0 else x
    logits: Tensor = model.task_classifier[past_task](model.hidden(seen, masks)[:, -1])
    return logits


def continual_loss(
    model: ReferenceTCN, teacher: ReferenceTCN, x: Tensor, y: Tensor, users: Sequence[Tensor], ratios: Sequence[float],
    s: float, student_mask: str = "past",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(class loss of Eq. 18, retention loss of Eq. 16) of the newest task; arguments as in `continual_step`."""
    if student_mask not in ("past", "current"):
        raise ConfigError(f"student_mask: got {student_mask!r}, expected past or current")
    past = range(teacher.num_tasks)
    if not model.num_tasks - 1 == teacher.num_tasks == len(users) == len(ratios):
        raise ShapeError(
            f"got a model of {model.num_tasks} tasks, a teacher of {teacher.num_tasks}, {len(users)} user lists and "
            f"{len(ratios)} ratios, expected one teacher task, list and ratio for each task but the current one"
        )
    masks, teacher_masks, current = model.all_masks(s), teacher.all_masks(s), model.num_tasks - 1
    logits = model.task_classifier[current](model.hidden(x, masks[:, current])[:, -1])
    used = {j: j if student_mask == "past" else current for j in past}
    student = [past_logits(model, x[users[j]], j, masks[:, used[j]]) for j in past]
    pseudo = [past_logits(teacher, x[users[j]], j, teacher_masks[:, j]).detach() for j in past]
    return cross_entropy(logits, y), retention_loss(student, pseudo, ratios)


def next_ratios(model: ReferenceTCN, teacher: ReferenceTCN, s: float, c: float = 6.0) -> list[float]:
    """rho_j of Eq. 15 for every past task j, from the masks at scale s."""
    with torch.no_grad():
        current, past = model.all_masks(s)[:, -1], teacher.all_masks(s)
    return [rho(past[:, j], current, c) for j in range(teacher.num_tasks)]


def continual_step(
    model: ReferenceTCN, teacher: ReferenceTCN, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor,
    users: Sequence[Tensor], rho: Sequence[float], s: float, alpha: float, student_mask: str = "past", c: float = 6.0,
) -> StepResult:  # fmt: skip
    """One training step of task i >= 2: L = class loss + alpha * retention loss (Eq. 17), then the clamp.

    Args:
        model: i tasks, in training. teacher: i-1 tasks, a frozen copy from the start of task i.
        x: int64 [B, L]. y: labels of task i, int64 [B].
        users: for each past task the rows of x drawn for it, int64 [n_j].
        rho: the ratio with which the users of each past task were drawn.
        s: mask scale, the same for student and teacher.
        alpha: weight of retention.
        student_mask: "past": the student uses its own mask of task j (published program); "current": that of task i, as
            printed in Eq. 10 and 16.
        c: scale of Eq. 15.

    Returns:
        StepResult; next_rho is computed from the masks of this step, before the update.
    """
    optimizer.zero_grad()
    class_loss, retention = continual_loss(model, teacher, x, y, users, rho, s, student_mask)
    next_rho = next_ratios(model, teacher, s, c)
    (class_loss + alpha * retention).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    clamp_task_embeddings(model)
    return StepResult(class_loss.item(), retention.item(), next_rho)
