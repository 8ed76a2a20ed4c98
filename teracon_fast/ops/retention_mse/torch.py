"""`retention_mse` of one past task in plain PyTorch operations, a block of labels at a time: any device, any floating dtype.
The `torch` backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from teracon_fast.ops.heads import sums_dtype

Needs = tuple[bool, bool, bool]  # gradients of the student's hidden states, weight and bias
Result = tuple[Tensor, Tensor, Tensor, Tensor]

_BLOCK_BYTES = 64 << 20


def distance(
    student_hidden: Tensor, weight: Tensor, bias: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, teacher_bias: Tensor,
    coefficient: Tensor, valid: Tensor | None, form: str, needs: Needs, factored: bool,
) -> Result:  # fmt: skip
    """`coefficient * sum((student logits - teacher logits)^2)`, and its gradients, empty where not needed.

    `coefficient` is a scalar; rows from `valid` on, an int32 scalar, are padding and count as no difference.

    With `factored`, the gradient of the logits `[C, n]` stands for that of the weight: only the `cpu` backend is asked for it.
    """
    assert not factored
    dtype = student_hidden.dtype
    wide = sums_dtype(dtype)
    coefficient = coefficient.to(wide)
    loss = student_hidden.new_zeros((), dtype=wide)
    d_hidden = student_hidden.new_zeros(student_hidden.shape if needs[0] else (0,), dtype=wide)
    d_weight = weight.new_empty(weight.shape if needs[1] else (0,))
    d_bias = bias.new_empty(bias.shape if needs[2] else (0,))
    step = max(1, _BLOCK_BYTES // (max(1, student_hidden.shape[0]) * student_hidden.element_size()))
    for low in range(0, weight.shape[0], step):
        part = slice(low, low + step)
        own = weight[part].to(dtype)
        student = F.linear(student_hidden, own, bias[part].to(dtype))
        teacher = F.linear(teacher_hidden, teacher_weight[part].to(dtype), teacher_bias[part].to(dtype))
        difference = student.to(wide) - teacher.to(wide)
        if valid is not None:
            difference.masked_fill_((torch.arange(len(difference), device=valid.device) >= valid)[:, None], 0)
        loss += difference.square().sum()
        difference *= 2 * coefficient
        low_difference = difference.to(dtype)
        if needs[0]:
            d_hidden += low_difference @ own
        if needs[1]:
            d_weight[part] = (low_difference.t() @ student_hidden).to(weight.dtype)
        if needs[2]:
            d_bias[part] = difference.sum(0).to(bias.dtype)
    return loss * coefficient, d_hidden.to(dtype), d_weight, d_bias
