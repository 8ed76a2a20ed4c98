"""`task_masks` by Triton kernels, one launch forward and one backward. The `triton` backend.

Only this backend is a registered operation: autograd and compilers see through the formulas of the other one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from teracon_fast.kernels import masks as kernels
from teracon_fast.ops.backends import BackendError
from teracon_fast.ops.registration import flat, register
from teracon_fast.ops.task_masks.api import MaskParameters
from teracon_fast.ops.task_masks.torch import COSINE_EPS


class Masks(NamedTuple):
    """What the masks of some tasks are formed from."""

    own: kernels.Parameters
    s: float  # the scale, unless it is a tensor
    scale: Tensor | None
    tasks: list[int]


class Teacher(NamedTuple):
    """Of all past tasks, or nothing at all."""

    embeddings: Tensor | None = None
    weights: Tensor | None = None
    biases: Tensor | None = None
    negated: bool = False


class Inputs(NamedTuple):
    masks: Masks
    teacher: Teacher
    c: float
    current: int


class Results(NamedTuple):
    student: Tensor
    teacher: Tensor
    rho: Tensor


class Backward(NamedTuple):
    grad: Tensor
    masks: Masks


class Gradients(NamedTuple):
    masks_own_embeddings: Tensor
    masks_own_weights: Tensor
    masks_own_biases: Tensor


def task_masks(parameters: MaskParameters, s: float | Tensor, tasks: tuple[int, ...]) -> Tensor:
    """As `torch.task_masks`."""
    masks: Tensor = _task_masks(*flat(Inputs(_masks(parameters, s, tasks), Teacher(), 0.0, 0)))[0]
    return masks


def step_masks(
    student: MaskParameters, teacher: MaskParameters, s: float | Tensor, c: float, current: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `torch.step_masks`."""
    own = _masks(student, s, tuple(range(student.embeddings.shape[1])))
    embeddings, weights, biases = (None if part is None else part.detach() for part in teacher[:3])
    frozen = Teacher(embeddings, weights, biases, teacher.variant == "relation")
    masks, teachers, rho = _task_masks(*flat(Inputs(own, frozen, float(c), current)))
    return masks, teachers, rho


def _masks(parameters: MaskParameters, s: float | Tensor, tasks: tuple[int, ...]) -> Masks:
    own = kernels.Parameters(*parameters[:3], parameters.variant == "relation")
    if not isinstance(s, Tensor):
        return Masks(own, float(s), None, list(tasks))
    if s.requires_grad and torch.is_grad_enabled():
        raise BackendError("task_masks: s requires a gradient, which the backend 'triton' does not form, expected 'torch'")
    if s.device != own.embeddings.device:
        return Masks(own, float(s), None, list(tasks))  # on the host, where reading it waits for nothing
    return Masks(own, 0.0, s.detach(), list(tasks))


def _arguments(masks: Masks) -> tuple[kernels.Parameters, float | Tensor, tuple[int, ...]]:
    own, s, scale, tasks = masks
    return own, s if scale is None else scale, tuple(tasks)


def _forward(inputs: Inputs) -> Results:
    masks, teacher, c, current = inputs
    given = None if teacher.embeddings is None else kernels.Parameters(teacher.embeddings, *teacher[1:])
    return Results(*kernels.forward(*_arguments(masks), given, c, current, COSINE_EPS))


def _forward_fake(inputs: Inputs) -> Results:
    embeddings, teacher = inputs.masks.own.embeddings, inputs.teacher.embeddings
    sites, _, channels = embeddings.shape
    past = 0 if teacher is None else teacher.shape[1]
    return Results(
        embeddings.new_empty(sites, len(inputs.masks.tasks), channels),
        embeddings.new_empty(sites, past, channels),
        embeddings.new_empty(past, dtype=torch.float64),
    )


def _backward(inputs: Backward) -> Gradients:
    return Gradients(*kernels.backward(inputs.grad, *_arguments(inputs.masks)))


def _backward_fake(inputs: Backward) -> Gradients:
    embeddings, weights, biases, _ = inputs.masks.own
    return Gradients(*(embeddings.new_empty((0,) if part is None else part.shape) for part in (embeddings, weights, biases)))


_task_masks_backward = register("task_masks_backward", Backward, Gradients, _backward, _backward_fake)
_task_masks = register("task_masks", Inputs, Results, _forward, _forward_fake, _task_masks_backward)
