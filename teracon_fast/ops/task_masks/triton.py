"""`task_masks` by Triton kernels, one launch forward and one backward. The `triton` backend.

Only this backend is behind a registered operation: the formulas of the other one autograd and compilers see through.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from teracon_fast.ops.backends import BackendError

if TYPE_CHECKING:
    from teracon_fast.ops.task_masks import MaskParameters


def task_masks(parameters: MaskParameters, s: float | Tensor, tasks: tuple[int, ...]) -> Tensor:
    """As `_torch_task_masks.task_masks`."""
    embeddings, weights, biases, variant = parameters
    masks: Tensor = _task_masks(
        embeddings, weights, biases, *_scale(s, embeddings), variant == "relation", list(tasks), None, None, None, False, 0.0, 0
    )[0]
    return masks


def step_masks(
    student: MaskParameters, teacher: MaskParameters, s: float | Tensor, c: float, current: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_torch_task_masks.step_masks`."""
    frozen = (None if part is None else part.detach() for part in teacher[:3])
    masks, teachers, rho = _task_masks(
        *student[:3], *_scale(s, student.embeddings), student.variant == "relation",
        list(range(student.embeddings.shape[1])), *frozen, teacher.variant == "relation", float(c), current,
    )  # fmt: skip
    return masks, teachers, rho


def _scale(s: float | Tensor, embeddings: Tensor) -> tuple[float, Tensor | None]:
    """The scale as a number, or as a tensor on the device, which is not waited for."""
    if not isinstance(s, Tensor):
        return float(s), None
    if s.requires_grad and torch.is_grad_enabled():
        raise BackendError("task_masks: s requires a gradient, which the backend 'triton' does not form, expected 'torch'")
    if s.device != embeddings.device:
        return float(s), None  # on the host, where reading it waits for nothing
    return 0.0, s.detach()


def _forward(
    embeddings: Tensor, weights: Tensor | None, biases: Tensor | None, s: float, scale: Tensor | None, negated: bool,
    tasks: list[int], teacher_embeddings: Tensor | None, teacher_weights: Tensor | None, teacher_biases: Tensor | None,
    teacher_negated: bool, c: float, current: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from teracon_fast.kernels import masks as kernels

    own = kernels.Parameters(embeddings, weights, biases, negated)
    teacher = None
    if teacher_embeddings is not None:
        teacher = kernels.Parameters(teacher_embeddings, teacher_weights, teacher_biases, teacher_negated)
    return kernels.forward(own, s if scale is None else scale, tuple(tasks), teacher, c, current)


def _forward_fake(
    embeddings: Tensor, weights: Tensor | None, biases: Tensor | None, s: float, scale: Tensor | None, negated: bool,
    tasks: list[int], teacher_embeddings: Tensor | None, teacher_weights: Tensor | None, teacher_biases: Tensor | None,
    teacher_negated: bool, c: float, current: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    sites, _, channels = embeddings.shape
    past = 0 if teacher_embeddings is None else teacher_embeddings.shape[1]
    return (
        embeddings.new_empty(sites, len(tasks), channels),
        embeddings.new_empty(sites, past, channels),
        embeddings.new_empty(past, dtype=torch.float64),
    )


def _backward(
    grad: Tensor, embeddings: Tensor, weights: Tensor | None, biases: Tensor | None, s: float, scale: Tensor | None,
    negated: bool, tasks: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from teracon_fast.kernels import masks as kernels

    own = kernels.Parameters(embeddings, weights, biases, negated)
    return kernels.backward(grad, own, s if scale is None else scale, tuple(tasks))


def _backward_fake(
    grad: Tensor, embeddings: Tensor, weights: Tensor | None, biases: Tensor | None, s: float, scale: Tensor | None,
    negated: bool, tasks: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    weights, biases = (embeddings.new_empty(0) if part is None else part for part in (weights, biases))
    return embeddings.new_empty(embeddings.shape), weights.new_empty(weights.shape), biases.new_empty(biases.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    embeddings, weights, biases, ctx.s, scale, ctx.negated, ctx.tasks, *_ = inputs
    ctx.save_for_backward(embeddings, weights, biases, scale)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 13
    embeddings, weights, biases, scale = ctx.saved_tensors
    gradients = _task_masks_backward(grad, embeddings, weights, biases, ctx.s, scale, ctx.negated, ctx.tasks)
    return (*(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad[:3], strict=True)), *(None,) * 10)


_FORWARD, _BACKWARD = "teracon_fast::task_masks", "teracon_fast::task_masks_backward"
for _name, _function, _fake in ((_FORWARD, _forward, _forward_fake), (_BACKWARD, _backward, _backward_fake)):
    # define + impl rather than custom_op, as in masked_conv.
    torch.library.define(_name, torch.library.infer_schema(_function, mutates_args=()))
    torch.library.impl(_name, "default", _function)
    torch.library.register_fake(_name, _fake)
torch.library.register_autograd(_FORWARD, _autograd, setup_context=_setup_context)
_task_masks = torch.ops.teracon_fast.task_masks.default
_task_masks_backward = torch.ops.teracon_fast.task_masks_backward.default
