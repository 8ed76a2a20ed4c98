"""Knowledge retention: squared distance between the student's and the teacher's logits of every past task.

`sum_j rho_j / sum(rho) * mean((student logits_j - teacher logits_j)^2)`, mean over users and labels (Eq. 16 of the paper).

The teacher's forward pass of the heads is part of the operation, and loss and gradients come from the same pass over the labels,
so no [users, labels] matrix is ever held.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from teracon_fast.errors import ShapeError
from teracon_fast.ops import backends, low_rank
from teracon_fast.ops.heads import autocast_hidden, check_head, keep_gradients, kept_gradients, sums_dtype
from teracon_fast.ops.retention_mse import cpu as _cpu_retention_mse
from teracon_fast.ops.retention_mse import torch as _torch_retention_mse
from teracon_fast.ops.retention_mse import triton as _triton_retention_mse
from teracon_fast.ops.retention_mse.torch import Needs, Result

FORMS = ("auto", "direct", "gram")


class _Implementation(Protocol):
    """What a backend's module offers: see `_torch_retention_mse` for the meaning of the arguments."""

    def distance(
        self, student_hidden: Tensor, weight: Tensor, bias: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor,
        teacher_bias: Tensor, coefficient: Tensor, valid: Tensor | None, form: str, needs: Needs, factored: bool,
    ) -> Result: ...  # fmt: skip


_IMPLEMENTATIONS: dict[str, _Implementation] = {
    "cpu": _cpu_retention_mse, "torch": _torch_retention_mse, "triton": _triton_retention_mse
}  # fmt: skip

OneOrMore = Tensor | Sequence[Tensor]


def retention_mse(
    student_hidden: OneOrMore, weight: OneOrMore, bias: OneOrMore, teacher_hidden: OneOrMore, teacher_weight: OneOrMore,
    teacher_bias: OneOrMore, rho: Sequence[float] | Tensor | None = None, *, scale: float = 1.0, form: str = "auto",
    factored_gradients: bool = False, valid: Tensor | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Retention loss of one past task, or of several with their own heads and users.

    Every tensor argument is one tensor, or a sequence with one for each past task. Under autocast hidden states take the autocast
    dtype; parameters keep theirs and are rounded where they are used.

    Args:
        student_hidden, teacher_hidden: floating `[n_j, f]`, the same users in the same order; n_j at least 1.
        weight: the student's heads `[C_j, f]`, of the dtype of the hidden states, or float32 where that is a half precision.
            bias: `[C_j]`, as the weight.
        teacher_weight, teacher_bias: the teacher's heads, as the student's.
        rho: per past task, the rate that its users were drawn with; None for equal ones. A tensor stays where it is.
        scale: what the loss is multiplied by (alpha of Eq. 18). Gradients are formed with the loss, so a factor here costs
            nothing, while one outside costs a pass over every gradient.
        form: "direct", or "gram", whose cost does not depend on the number of users (`cpu` backend only), or "auto": what
            measures faster.
        factored_gradients: leave the gradient of large weights as factors for `optim.Adam`, where that measures faster (`cpu`
            backend, weights that are leaves): `weight.grad` then lacks it, see `optim.low_rank`. Not in compiled code.
        valid: int32 `[J]`, for each past task how many of its rows are users, at least 1; the others are padding, which counts
            for nothing. None: all of them. With a `rho` on the same device, neither is read on the host.
        backend: "auto", "torch", or another that `teracon_fast.env_report()` lists as available.

    Returns:
        Scalar, float32 where hidden states are a half precision, else of their dtype; differentiable once with respect to the
        student's tensors. The teacher's carry no gradient.

    Raises:
        ShapeError: when the numbers of tasks, shapes, dtypes or devices do not fit, a task has no users, or the form is unknown.
        BackendError: when an explicitly requested backend or form is not available for this input.
    """
    parts = [_sequence(part) for part in (student_hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias)]
    rates = [1.0] * len(parts[0]) if rho is None else rho
    counts = [len(part) for part in (*parts, rates, *([] if valid is None else [valid]))]
    if len(set(counts)) != 1 or not counts[0]:
        raise ShapeError(f"retention_mse: got {counts} past tasks, expected the same positive number of each argument")
    if form not in FORMS:
        raise ShapeError(f"retention_mse: form is {form!r}, expected one of {list(FORMS)}")
    terms = []
    for j, (student, own_weight, own_bias, teacher, its_weight, its_bias) in enumerate(zip(*parts, strict=True)):
        student, teacher = autocast_hidden(student), autocast_hidden(teacher).detach()
        _check(j, student, own_weight, own_bias, teacher, its_weight, its_bias)
        rows = student.shape[0] if valid is None else valid[j]
        share = rates[j] / (rates.sum() if isinstance(rates, Tensor) else sum(rates))
        coefficient = _scalar(scale * share / (rows * own_weight.shape[0]), student.device)
        grad = torch.is_grad_enabled()
        needs = [grad and tensor.requires_grad for tensor in (student, own_weight, own_bias)]
        leave = factored_gradients and needs[1] and own_weight.is_leaf and not torch.compiler.is_compiling() and (
            valid is None and backends.resolve(backend, "retention_mse", student.device, student.dtype) == "cpu"
            and _cpu_retention_mse.factors_are_faster(form, len(student), own_weight, student.dtype)
        )  # fmt: skip
        terms.append(_retention_mse(
            student, own_weight, own_bias, teacher, its_weight.detach(), its_bias.detach(), coefficient,
            None if valid is None else rows, form, backend, *needs, leave,
        )[0])  # fmt: skip
    # By additions, through which a gradient passes as the tensor that it is: see `unit_gradient`.
    return functools.reduce(torch.add, terms)


def _scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """The value on the device, in double precision; a number is filled in there, without a copy to wait for."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)


def _sequence(part: OneOrMore) -> Sequence[Tensor]:
    return (part,) if isinstance(part, Tensor) else part


def _check(
    task: int, student: Tensor, weight: Tensor, bias: Tensor, teacher: Tensor, teacher_weight: Tensor, teacher_bias: Tensor
) -> None:
    name = f"retention_mse, past task {task}"
    if student.shape != teacher.shape or student.dtype != teacher.dtype or not len(student):
        raise ShapeError(
            f"{name}: got student rows {student.dtype} {list(student.shape)} and teacher rows {teacher.dtype} "
            f"{list(teacher.shape)}, expected equal shapes with at least one row, and equal dtypes"
        )
    check_head(name, student, weight, bias)
    check_head(f"{name}, teacher", teacher, teacher_weight, teacher_bias)
    if teacher_weight.shape != weight.shape or teacher.device != student.device:
        raise ShapeError(
            f"{name}: the teacher's weight is {list(teacher_weight.shape)} on {teacher_weight.device}, "
            f"expected as the student's, {list(weight.shape)} on {weight.device}"
        )


def _distance(
    student_hidden: Tensor, weight: Tensor, bias: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, teacher_bias: Tensor,
    coefficient: Tensor, valid: Tensor | None, form: str, backend: str, need_hidden: bool, need_weight: bool, need_bias: bool,
    factored: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    chosen = backends.resolve(backend, "retention_mse", student_hidden.device, student_hidden.dtype)
    if form == "gram" and chosen != "cpu":
        raise backends.BackendError(f"retention_mse: backend {chosen!r} has no form 'gram', expected 'auto' or 'direct'")
    return _IMPLEMENTATIONS[chosen].distance(
        student_hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, coefficient, valid, form,
        (need_hidden, need_weight, need_bias), factored,
    )  # fmt: skip


def _distance_fake(
    student_hidden: Tensor, weight: Tensor, bias: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, teacher_bias: Tensor,
    coefficient: Tensor, valid: Tensor | None, form: str, backend: str, need_hidden: bool, need_weight: bool, need_bias: bool,
    factored: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs, needs = (student_hidden, weight, bias), (need_hidden, need_weight, need_bias)
    d_hidden, d_weight, d_bias = (t.new_empty(t.shape if need else (0,)) for t, need in zip(inputs, needs, strict=True))
    d_weight = weight.new_empty(weight.shape[0], student_hidden.shape[0]) if factored else d_weight
    return student_hidden.new_empty((), dtype=sums_dtype(student_hidden.dtype)), d_hidden, d_weight, d_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    keep_gradients(ctx, output[1:])
    ctx.left_for = (inputs[1], inputs[0].detach().float()) if inputs[-1] else None


def _autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 14
    gradients, needed = kept_gradients(ctx, grad), list(ctx.needs_input_grad[:3])
    if ctx.left_for is not None:
        weight, hidden = ctx.left_for
        low_rank.leave(weight, low_rank.Factors(gradients[1], hidden))
        needed[1] = False
    return (*(g if need else None for g, need in zip(gradients, needed, strict=True)), *(None,) * 11)


_NAME = "teracon_fast::retention_mse"
# define + impl rather than custom_op, as in masked_conv.
torch.library.define(_NAME, torch.library.infer_schema(_distance, mutates_args=()))
torch.library.impl(_NAME, "default", _distance)
torch.library.register_fake(_NAME, _distance_fake)
torch.library.register_autograd(_NAME, _autograd, setup_context=_setup_context)
_retention_mse = torch.ops.teracon_fast.retention_mse.default
