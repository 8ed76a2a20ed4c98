"""`task_masks` in plain PyTorch, with autograd's gradients: any device, any floating dtype. The `torch` backend.

A *site* is a place where a mask is applied: two per residual block, in network order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from teracon_fast.ops.task_masks.api import MaskParameters, MaskVariant

# Least length of a mask in a cosine.
COSINE_EPS = 1e-6


def task_masks(parameters: MaskParameters, s: float | Tensor, tasks: tuple[int, ...]) -> Tensor:
    """`[S, n, f]`; weights and biases, where there are any, are those of `tasks`."""
    embeddings, weights, biases, variant = parameters
    if weights is None or biases is None:
        return plain_masks(of_tasks(embeddings, tasks), s)
    return relation_masks(embeddings, weights, biases, s, variant, tasks)


def step_masks(
    student: MaskParameters, teacher: MaskParameters, s: float | Tensor, c: float, current: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The student's masks `[S, T, f]`; without gradient the teacher's `[S, J, f]` and rho `[J]`."""
    own = task_masks(student, s, tuple(range(student.embeddings.shape[1])))
    with torch.no_grad():
        teachers = task_masks(teacher, s, tuple(range(teacher.embeddings.shape[1])))
        return own, teachers, rho(teachers, own[:, current].detach(), c)


def plain_masks(embeddings: Tensor, s: float | Tensor) -> Tensor:
    """`sigmoid(s * e)` (Eq. 6), elementwise for any shape."""
    return torch.sigmoid(s * embeddings)


def of_tasks(masks: Tensor, tasks: Sequence[int]) -> Tensor:
    """The masks of some tasks, `[S, T, f]` to `[S, n, f]`; a task may be asked for several times."""
    if tuple(tasks) == tuple(range(masks.shape[1])):
        return masks
    if not tasks:
        return masks[:, :0]
    # Not by a list of indices, whose copy waits for the device.
    parts = masks.unbind(1)
    return torch.stack([parts[task] for task in tasks], 1)


def _columns(
    num_tasks: int, variant: MaskVariant, tasks: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """For each requested task t and task i: column of w_t that holds i, column of its negated row, and whether it has one."""
    positive, negative, negated = [], [], []
    for t in tasks:
        others = [i for i in range(num_tasks) if i != t]
        step = 2 if variant == "relation" else 1
        plus = {t: 0} | {i: 1 + step * k for k, i in enumerate(others)}
        positive.append([plus[i] for i in range(num_tasks)])
        has = [variant == "relation" and i != t for i in range(num_tasks)]
        negative.append([plus[i] + 1 if h else 0 for i, h in enumerate(has)])
        negated.append([float(h) for h in has])
    return tuple(torch.tensor(part, device=device) for part in (positive, negative, negated))  # type: ignore[return-value]


@lru_cache(maxsize=256)
def _kept_columns(
    num_tasks: int, variant: MaskVariant, tasks: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """`_columns`, copied to a device once."""
    with torch.inference_mode(False):  # the first call may be inference, the next training
        return _columns(num_tasks, variant, tasks, device)


def relation_masks(
    embeddings: Tensor,
    weights: Tensor,
    biases: Tensor,
    s: float | Tensor,
    variant: MaskVariant = "relation",
    tasks: tuple[int, ...] | None = None,
) -> Tensor:
    """Relation-aware masks of several tasks at every site (Eq. 12, 13).

    tanh is odd, so the weights of a task's row and of its negated row act through their difference: one matrix product
    `[tasks, T] @ tanh(s * e)` per site serves all tasks.

    Args:
        embeddings: `[S, T, f]`, task embeddings of all T tasks.
        weights: `[S, n, 2T-1]` ("positive_only": `[S, n, T]`), relation weights of the requested tasks.
        biases: `[S, n]`.
        s: mask scale.
        variant: "relation" or "positive_only".
        tasks: the n requested tasks, counted from 0; None for all T.

    Returns:
        `[S, n, f]` in (0, 1).
    """
    num_tasks = embeddings.shape[1]
    tasks = tuple(range(num_tasks)) if tasks is None else tasks
    traced = torch.compiler.is_compiling() or is_fake(weights)
    columns = _columns if traced else _kept_columns
    positive, negative, negated = columns(num_tasks, variant, tasks, embeddings.device)
    sites = embeddings.shape[0]
    mixing = weights.gather(2, positive.expand(sites, -1, -1))
    if variant == "relation":
        mixing = mixing - weights.gather(2, negative.expand(sites, -1, -1)) * negated.to(weights.dtype)
    with torch.autocast(embeddings.device.type, enabled=False):
        mixed = torch.baddbmm(biases[:, :, None], mixing, torch.tanh(s * embeddings))
    return torch.sigmoid(s * mixed)


def similarity(first: Tensor, second: Tensor, eps: float = COSINE_EPS) -> Tensor:
    """Cosine similarity over channels, `[..., f]` and `[..., f]` to `[...]`."""
    return torch.cosine_similarity(first, second, dim=-1, eps=eps)


@torch.no_grad()
def rho(teacher_masks: Tensor, current_mask: Tensor, c: float = 6.0) -> Tensor:
    """Share of a batch's users that retention draws for each past task in the next step (Eq. 15).

    Args:
        teacher_masks: `[S, J, f]`, frozen masks of the J past tasks.
        current_mask: `[S, f]`, mask of the task in training.
        c: scale of the cosine similarity.

    Returns:
        float64 `[J]` on the masks' device (no wait for the device), in [1 - sigmoid(c), 0.5] for masks in (0, 1).
    """
    # The published program averages in double precision; the number of drawn users is rounded down from this.
    return 1.0 - torch.sigmoid(c * similarity(teacher_masks, current_mask[:, None])).double().mean(0)
