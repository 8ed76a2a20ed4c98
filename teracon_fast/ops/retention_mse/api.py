"""Knowledge retention: squared distance between the student's and the teacher's logits of every past task.

`sum_j rho_j / sum(rho) * mean((student logits_j - teacher logits_j)^2)`, mean over users and labels (Eq. 16 of the paper).

The teacher's heads run inside the operation, and loss and gradients come from one pass over the labels, so that no
[users, labels] matrix is ever held.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from teracon_fast.errors import ShapeError
from teracon_fast.ops import backends, low_rank
from teracon_fast.ops.checks import autocast, sums_dtype
from teracon_fast.ops.heads import Head, check_head, keep_gradients, kept_gradients
from teracon_fast.ops.registration import Gradient, flat, implementation, register

FORMS = ("auto", "direct", "gram")


class Needs(NamedTuple):
    """Gradients of the student's head that are wanted."""

    hidden: bool
    weight: bool
    bias: bool


class Inputs(NamedTuple):
    """All that one past task's loss computes from.

    Attributes:
        student, teacher: heads with the hidden states of the same users.
        coefficient: float64 scalar, of the sum of squares.
        valid: int32 scalar; rows from there on are padding and count as no difference. None: all rows are users.
        form, backend: as in `retention_mse`.
        needs: which gradients are wanted.
        low_rank: whether the gradient of the logits `[C, n]` stands for that of the weight; `cpu` backend only.
    """

    student: Head
    teacher: Head
    coefficient: Tensor
    valid: Tensor | None
    form: str
    backend: str
    needs: Needs
    low_rank: bool


class Results(NamedTuple):
    """`coefficient * sum((student logits - teacher logits)^2)`, and its gradients, empty where they are not wanted."""

    loss: Tensor
    student: Head


OneOrMore = Tensor | Sequence[Tensor]


def retention_mse(
    student_hidden: OneOrMore, weight: OneOrMore, bias: OneOrMore, teacher_hidden: OneOrMore, teacher_weight: OneOrMore,
    teacher_bias: OneOrMore, rho: Sequence[float] | Tensor | None = None, *, scale: float = 1.0, form: str = "auto",
    low_rank_gradients: bool = False, valid: Tensor | None = None, backend: str = "auto",
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
        scale: factor of the loss (alpha of Eq. 18). Gradients are computed with the loss, so a factor here costs nothing, while
            one outside costs a pass over every gradient.
        form: "direct", or "gram", whose cost does not depend on the number of users (`cpu` backend only), or "auto": what
            measures faster.
        low_rank_gradients: leave the gradient of large weights as low-rank factors for `optim.Adam`, where that measures faster
            (`cpu` backend, weights that are leaves): `weight.grad` then lacks it, see `ops.low_rank`. Not in compiled code.
        valid: int32 `[J]`, for each past task how many of its rows are users, at least 1; the others are padding, which does not
            count. None: all of them. With a `rho` on the same device, neither is read on the host.
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
    for j, heads in enumerate(zip(*parts, strict=True)):
        student = Head(autocast(heads[0]), *heads[1:3])
        teacher = Head(autocast(heads[3]).detach(), *(part.detach() for part in heads[4:]))
        _check(j, student, teacher)
        own_valid = None if valid is None else valid[j]
        rows = len(student.hidden) if own_valid is None else own_valid
        share = rates[j] / (rates.sum() if isinstance(rates, Tensor) else sum(rates))
        coefficient = _scalar(scale * share / (rows * len(student.weight)), student.hidden.device)
        needs = Needs(*(torch.is_grad_enabled() and tensor.requires_grad for tensor in student))
        inputs = Inputs(student, teacher, coefficient, own_valid, form, backend, needs, False)
        if low_rank_gradients and needs.weight and student.weight.is_leaf and valid is None and _low_rank_is_faster(inputs):
            inputs = inputs._replace(low_rank=True)
        terms.append(_retention_mse(*flat(inputs))[0])
    # By additions, through which a gradient passes as the tensor that it is: see `unit_gradient`.
    return functools.reduce(torch.add, terms)


def _low_rank_is_faster(inputs: Inputs) -> bool:
    if torch.compiler.is_compiling():
        return False
    faster = getattr(implementation("retention_mse", inputs), "low_rank_is_faster", None)
    return faster is not None and bool(faster(inputs.form, inputs.student))


def _scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """The value on the device in double precision; numbers are filled in without a copy."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)


def _sequence(part: OneOrMore) -> Sequence[Tensor]:
    return (part,) if isinstance(part, Tensor) else part


def _check(task: int, student: Head, teacher: Head) -> None:
    name = f"retention_mse, past task {task}"
    own, its = student.hidden, teacher.hidden
    if own.shape != its.shape or own.dtype != its.dtype or not len(own):
        raise ShapeError(
            f"{name}: got student rows {own.dtype} {list(own.shape)} and teacher rows {its.dtype} "
            f"{list(its.shape)}, expected equal shapes with at least one row, and equal dtypes"
        )
    check_head(name, student)
    check_head(f"{name}, teacher", teacher)
    if teacher.weight.shape != student.weight.shape or its.device != own.device:
        raise ShapeError(
            f"{name}: the teacher's weight is {list(teacher.weight.shape)} on {teacher.weight.device}, "
            f"expected as the student's, {list(student.weight.shape)} on {student.weight.device}"
        )


def _distance(inputs: Inputs) -> Any:
    hidden = inputs.student.hidden
    chosen = backends.resolve(inputs.backend, "retention_mse", hidden.device, hidden.dtype)
    if inputs.form == "gram" and chosen != "cpu":
        raise backends.BackendError(f"retention_mse: backend {chosen!r} has no form 'gram', expected 'auto' or 'direct'")
    return implementation("retention_mse", inputs).distance(inputs)


def _distance_fake(inputs: Inputs) -> Results:
    student = inputs.student
    gradients = Head(*(t.new_empty(t.shape if need else (0,)) for t, need in zip(student, inputs.needs, strict=True)))
    if inputs.low_rank:
        gradients = gradients._replace(weight=student.weight.new_empty(len(student.weight), len(student.hidden)))
    return Results(student.hidden.new_empty((), dtype=sums_dtype(student.hidden.dtype)), gradients)


def _setup(ctx: Any, inputs: Inputs, results: Results) -> None:
    keep_gradients(ctx, results.student)
    ctx.low_rank_of = (inputs.student.weight, inputs.student.hidden.detach().float()) if inputs.low_rank else None


def _gradient(ctx: Any, grad: Tensor) -> dict[str, Tensor | None]:
    d_hidden, d_weight, d_bias = kept_gradients(ctx, grad)
    if ctx.low_rank_of is None:
        return {"student_hidden": d_hidden, "student_weight": d_weight, "student_bias": d_bias}
    weight, hidden = ctx.low_rank_of
    low_rank.accumulate(weight, low_rank.Factors(d_weight, hidden))
    return {"student_hidden": d_hidden, "student_bias": d_bias}


_retention_mse = register("retention_mse", Inputs, Results, _distance, _distance_fake, Gradient(_setup, _gradient))
