"""`retention_mse` of one past task in plain PyTorch operations, a block of labels at a time: any device, any floating dtype.
The `torch` backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from teracon_fast.ops.checks import sums_dtype
from teracon_fast.ops.heads import Head
from teracon_fast.ops.retention_mse.api import Inputs, Results

_BLOCK_BYTES = 64 << 20


def distance(inputs: Inputs) -> Results:
    """The loss and its gradients."""
    (hidden, weight, bias), teacher, coefficient, valid, _, _, needs, _ = inputs
    dtype, wide = hidden.dtype, sums_dtype(hidden.dtype)
    coefficient = coefficient.to(wide)
    loss = hidden.new_zeros((), dtype=wide)
    d_hidden = hidden.new_zeros(hidden.shape if needs.hidden else (0,), dtype=wide)
    d_weight = weight.new_empty(weight.shape if needs.weight else (0,))
    d_bias = bias.new_empty(bias.shape if needs.bias else (0,))
    step = max(1, _BLOCK_BYTES // (max(1, hidden.shape[0]) * hidden.element_size()))
    for low in range(0, weight.shape[0], step):
        part = slice(low, low + step)
        own = weight[part].to(dtype)
        student = F.linear(hidden, own, bias[part].to(dtype))
        its = F.linear(teacher.hidden, teacher.weight[part].to(dtype), teacher.bias[part].to(dtype))
        difference = student.to(wide) - its.to(wide)
        if valid is not None:
            difference.masked_fill_((torch.arange(len(difference), device=valid.device) >= valid)[:, None], 0)
        loss += difference.square().sum()
        difference *= 2 * coefficient
        low_difference = difference.to(dtype)
        if needs.hidden:
            d_hidden += low_difference @ own
        if needs.weight:
            d_weight[part] = (low_difference.t() @ hidden).to(weight.dtype)
        if needs.bias:
            d_bias[part] = difference.sum(0).to(bias.dtype)
    return Results(loss * coefficient, Head(d_hidden.to(dtype), d_weight, d_bias))
