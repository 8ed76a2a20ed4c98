"""`retention_mse` of one past task by the compiled C++ kernels, for float32 and bfloat16 on the CPU. The `cpu` backend.

The direct form makes one pass over the labels: student's and teacher's logits of a block meet in registers, and what comes of
them for the loss and all gradients is formed before the next block.

The Gram form makes no logits. With M = [Ws - Wt, bs - bt, Wt] and, of each user, z = [hs, 1, hs - ht], the differences are M z:

    loss = c * sum_ij (M^T M)_ij (Z^T Z)_ij,   d(hs) = 2 c (M^T M Z)[of hs],   [d(Ws), d(bs)] = 2 c M (Z^T Z)[:, of hs and 1]

whose cost does not depend on the number of users. Differences of weights and of states, not of logits, keep its rounding small.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from teracon_fast.ops.heads_cpu import dense_head, schedule
from teracon_fast.ops.retention_mse.torch import Needs, Result

# Labels in a block of M: it has twice the width of a weight, and larger blocks save traffic of the sums.
_GRAM_BLOCK = 252


# Numbers of a weight from which on its gradient is left as factors.
_FACTORED_FROM = 10_000_000


def gram_is_faster(rows: int, channels: int, dtype: torch.dtype) -> bool:
    """Whether the Gram form measures faster than the direct one: see bench/NOTES.md."""
    return 4 * rows >= (5 if dtype == torch.float32 else 10) * channels


def chosen_form(form: str, rows: int, channels: int, dtype: torch.dtype) -> str:
    """ "direct" or "gram"."""
    if form != "auto":
        return form
    return "gram" if gram_is_faster(rows, channels, dtype) else "direct"


def factors_are_faster(form: str, rows: int, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether leaving the gradient of a weight as factors measures faster than forming it, see bench/NOTES.md: a large one, which
    would go to memory and come back, from few users."""
    large = weight.numel() >= _FACTORED_FROM and weight.dtype == torch.float32
    return large and 2 * rows <= weight.shape[1] and chosen_form(form, rows, weight.shape[1], dtype) == "direct"


def distance(
    student_hidden: Tensor, weight: Tensor, bias: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, teacher_bias: Tensor,
    coefficient: Tensor, valid: Tensor | None, form: str, needs: Needs, factored: bool,
) -> Result:  # fmt: skip
    """As `_torch_retention_mse.distance`. Only the direct form has factors, and those have no padding rows."""
    if valid is not None:
        return _of_valid_rows(
            int(valid), student_hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, coefficient, form, needs
        )
    scale = float(coefficient)
    arguments = (student_hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias)
    if not factored and chosen_form(form, len(student_hidden), weight.shape[1], student_hidden.dtype) == "gram":
        return _by_gram(*arguments, scale, needs)
    d_hidden, d_weight, d_bias = _room(student_hidden, weight, bias, (needs[0], needs[1] and not factored, needs[2]))
    d_logits = torch.empty(weight.shape[0], len(student_hidden)) if factored else torch.empty(0)
    loss = torch.ops.teracon_fast.retention_mse_cpu(
        *dense_head(student_hidden, weight, bias), *dense_head(teacher_hidden, teacher_weight, teacher_bias), scale,
        *schedule(weight.shape[0]), d_hidden, d_weight, d_bias, d_logits,
    )  # fmt: skip
    d_weight = d_logits if factored else d_weight
    return torch.tensor(loss, dtype=torch.float32), d_hidden.to(student_hidden.dtype), d_weight, d_bias.to(bias.dtype)


def _of_valid_rows(
    valid: int, student_hidden: Tensor, weight: Tensor, bias: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor,
    teacher_bias: Tensor, coefficient: Tensor, form: str, needs: Needs,
) -> Result:  # fmt: skip
    heads = (weight, bias, teacher_hidden[:valid], teacher_weight, teacher_bias)
    loss, d_hidden, d_weight, d_bias = distance(student_hidden[:valid], *heads, coefficient, None, form, needs, False)
    if needs[0]:
        d_hidden = torch.cat([d_hidden, torch.zeros_like(student_hidden[valid:])])
    return loss, d_hidden, d_weight, d_bias


def _room(hidden: Tensor, weight: Tensor, bias: Tensor, needs: Needs) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty(hidden.shape if needs[0] else 0),
        torch.empty(weight.shape if needs[1] else 0, dtype=weight.dtype),
        torch.empty(bias.shape if needs[2] else 0),
    )


def _by_gram(
    student_hidden: Tensor, weight: Tensor, bias: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, teacher_bias: Tensor,
    coefficient: float, needs: Needs,
) -> Result:  # fmt: skip
    channels = weight.shape[1]
    hidden = student_hidden.double()
    states = torch.cat([hidden, hidden.new_ones(len(hidden), 1), hidden - teacher_hidden.double()], 1)
    moments = states.t() @ states
    scaled = (2 * coefficient * moments[:, : channels + 1]).float() if needs[1] or needs[2] else torch.empty(0, 1)
    _, d_weight, d_bias = _room(student_hidden, weight, bias, needs)
    width = 2 * channels + 1
    gram = torch.empty(width, width, dtype=torch.float64)
    known = teacher_gram(teacher_weight)
    torch.ops.teracon_fast.retention_gram_cpu(
        weight.contiguous(), bias.float().contiguous(), teacher_weight.contiguous(), teacher_bias.float().contiguous(), True,
        scaled[:, :-1].contiguous(), scaled[:, -1].contiguous(), _GRAM_BLOCK, torch.get_num_threads(), gram, d_weight, d_bias,
    )  # fmt: skip
    gram = gram.triu() + gram.triu(1).t()
    gram[channels + 1 :, channels + 1 :] = known
    loss = coefficient * (gram * moments).sum()
    d_hidden = torch.empty(0)
    if needs[0]:
        d_states = 2 * coefficient * (states @ gram)
        d_hidden = d_states[:, :channels] + d_states[:, channels + 1 :]
    return loss.float(), d_hidden.to(student_hidden.dtype), d_weight, d_bias.to(bias.dtype)


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
