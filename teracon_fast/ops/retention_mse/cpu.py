"""`retention_mse` of one past task by the compiled C++ kernels, for float32 and bfloat16 on the CPU. The `cpu` backend.

The direct form makes one pass over the labels: logits of student and teacher exist for one block at a time, which contributes to
the loss and all gradients before the next one.

The Gram form needs no logits. With M = [Ws - Wt, bs - bt, Wt] and, of each user, z = [hs, 1, hs - ht], the differences are M z:

    loss = c * sum_ij (M^T M)_ij (Z^T Z)_ij,   d(hs) = 2 c (M^T M Z)[of hs],   [d(Ws), d(bs)] = 2 c M (Z^T Z)[:, of hs and 1]

whose cost does not depend on the number of users. Differences of weights and of states, not of logits, keep its rounding small.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from teracon_fast.ops.heads import Head, dense_head, schedule
from teracon_fast.ops.retention_mse.api import Inputs, Needs, Results

# Labels in a block of M: it has twice the width of a weight, and larger blocks save traffic of the sums.
_GRAM_BLOCK = 252
# Elements of a weight from which on its gradient may be left as low-rank factors.
_LOW_RANK_FROM = 10_000_000


def gram_is_faster(rows: int, channels: int, dtype: torch.dtype) -> bool:
    """Whether the Gram form measures faster than the direct one: see bench/NOTES.md."""
    return 4 * rows >= (5 if dtype == torch.float32 else 10) * channels


def chosen_form(form: str, rows: int, channels: int, dtype: torch.dtype) -> str:
    """ "direct" or "gram"."""
    if form != "auto":
        return form
    return "gram" if gram_is_faster(rows, channels, dtype) else "direct"


def low_rank_is_faster(form: str, student: Head) -> bool:
    """Whether leaving the gradient of a weight as factors measures faster than forming it, see bench/NOTES.md: a large one, which
    does not fit the cache, from few users."""
    hidden, weight, _ = student
    large = weight.numel() >= _LOW_RANK_FROM and weight.dtype == torch.float32
    few = 2 * len(hidden) <= weight.shape[1]
    return large and few and chosen_form(form, len(hidden), weight.shape[1], hidden.dtype) == "direct"


def distance(inputs: Inputs) -> Results:
    """As `torch.distance`. Only the direct form has low-rank gradients, and those have no padding rows."""
    student, teacher, coefficient, valid, form, _, needs, low_rank = inputs
    if valid is not None:
        return _of_valid_rows(inputs, int(valid))
    hidden, weight, bias = student
    if not low_rank and chosen_form(form, len(hidden), weight.shape[1], hidden.dtype) == "gram":
        return _by_gram(student, teacher, float(coefficient), needs)
    gradients = _room(student, needs._replace(weight=needs.weight and not low_rank))
    d_logits = torch.empty(weight.shape[0], len(hidden)) if low_rank else torch.empty(0)
    loss = torch.ops.teracon_fast.retention_mse_cpu(
        *dense_head(student), *dense_head(teacher), float(coefficient), *schedule(weight.shape[0]), *gradients, d_logits
    )
    return _results(torch.tensor(loss, dtype=torch.float32), student, gradients, d_logits if low_rank else None)


def _results(loss: Tensor, student: Head, gradients: Head, d_logits: Tensor | None = None) -> Results:
    d_hidden, d_weight, d_bias = gradients
    d_weight = d_weight if d_logits is None else d_logits
    return Results(loss, Head(d_hidden.to(student.hidden.dtype), d_weight, d_bias.to(student.bias.dtype)))


def _of_valid_rows(inputs: Inputs, valid: int) -> Results:
    student, teacher = (head._replace(hidden=head.hidden[:valid]) for head in inputs[:2])
    loss, gradients = distance(inputs._replace(student=student, teacher=teacher, valid=None))
    if inputs.needs.hidden:
        padding = torch.zeros_like(inputs.student.hidden[valid:])
        gradients = gradients._replace(hidden=torch.cat([gradients.hidden, padding]))
    return Results(loss, gradients)


def _room(student: Head, needs: Needs) -> Head:
    hidden, weight, bias = student
    return Head(
        torch.empty(hidden.shape if needs.hidden else 0),
        torch.empty(weight.shape if needs.weight else 0, dtype=weight.dtype),
        torch.empty(bias.shape if needs.bias else 0),
    )


def _by_gram(student: Head, teacher: Head, coefficient: float, needs: Needs) -> Results:
    channels = student.weight.shape[1]
    hidden = student.hidden.double()
    states = torch.cat([hidden, hidden.new_ones(len(hidden), 1), hidden - teacher.hidden.double()], 1)
    moments = states.t() @ states
    wanted = needs.weight or needs.bias
    scaled = (2 * coefficient * moments[:, : channels + 1]).float() if wanted else torch.empty(0, 1)
    gradients = _room(student, needs._replace(hidden=False))
    width = 2 * channels + 1
    gram = torch.empty(width, width, dtype=torch.float64)
    known = teacher_gram(teacher.weight)
    torch.ops.teracon_fast.retention_gram_cpu(
        *dense_head(student)[1:], *dense_head(teacher)[1:], True, scaled[:, :-1].contiguous(), scaled[:, -1].contiguous(),
        _GRAM_BLOCK, torch.get_num_threads(), gram, *gradients[1:],
    )  # fmt: skip
    gram = gram.triu() + gram.triu(1).t()
    gram[channels + 1 :, channels + 1 :] = known
    loss = coefficient * (gram * moments).sum()
    if needs.hidden:
        d_states = 2 * coefficient * (states @ gram)
        gradients = gradients._replace(hidden=d_states[:, :channels] + d_states[:, channels + 1 :])
    return _results(loss.float(), student, gradients)


_TEACHER_GRAMS = WeakTensorKeyDictionary()


def teacher_gram(weight: Tensor) -> Tensor:
    """`weight.T @ weight` in float64, `[f, f]`: computed once for a weight that does not change, such as a teacher's."""
    version = None if weight.is_inference() else weight._version
    kept = _TEACHER_GRAMS.get(weight)
    if kept is not None and version is not None and kept[0] == version:
        gram: Tensor = kept[1]
        return gram
    gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
    with torch.no_grad():
        for part in weight.detach().split(512):
            gram += (part.float().t() @ part.float()).double()
    if version is not None:
        _TEACHER_GRAMS[weight] = (version, gram)
    return gram
