"""`masked_conv` by the compiled C++ kernels: float32 and bfloat16 activations on the CPU. The `cpu` backend; see csrc/cpu.

Parameters and masks reach the kernels in float32, whatever the activations are: the kernels round the weights themselves when
they put them into the order of their register tiles, and return the gradients unrounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from teracon_fast.ops.masked_conv.api import Backward, Gradients, Inputs, Parameters, Results, room

# As in csrc/cpu/masked_conv.h.
_ALGORITHMS = {"auto": 0, "direct": 1, "winograd": 2}


def forward(inputs: Inputs) -> Results:
    """As `torch.forward`."""
    results, tables = room(inputs), inputs.tables
    torch.ops.teracon_fast.masked_conv_cpu_forward(
        inputs.x.contiguous(), *_wide(inputs.parameters), tables.taps.contiguous(), tables.readers.contiguous(),
        len(tables.bag_offsets) - 1, *_options(inputs), *_dense(inputs.x, inputs.addend, inputs.residual, tables.residual_rows),
        results.out, *results.kept,
    )  # fmt: skip
    return results


def backward(backward: Backward) -> Gradients:
    """As `torch.backward`."""
    grad, inputs, kept, need_x, need_weight, need_residual, need_addend = backward
    x, parameters, tables = inputs[:3]
    weight, readers = parameters.weight, tables.residual_readers if need_residual else None
    wide = Parameters(*(torch.empty(parameter.shape) for parameter in parameters))
    wide = wide if need_weight else wide._replace(weight=torch.empty(0))
    d_x = x.new_empty(x.shape if need_x else 0)
    d_residual = x.new_empty(0 if readers is None else (len(readers), len(weight)))
    d_addend = x.new_empty(grad.shape if need_addend else 0)
    torch.ops.teracon_fast.masked_conv_cpu_backward(
        x.contiguous(), *_wide(parameters), tables.taps.contiguous(), tables.readers.contiguous(), *_options(inputs),
        grad.contiguous(), *kept, tables.bag_rows.contiguous(), tables.bag_offsets.contiguous(), *_dense(x, readers), d_x, *wide,
        d_residual, d_addend,
    )  # fmt: skip
    narrow = (gradient.to(parameter.dtype) for gradient, parameter in zip(wide, parameters, strict=True))
    return Gradients(d_x, Parameters(*narrow), d_residual, d_addend)


def _wide(parameters: Parameters) -> list[Tensor]:
    return [parameter.float().contiguous() for parameter in parameters]


def _dense(x: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """An empty tensor for one that is not given."""
    return [x.new_empty(0) if tensor is None else tensor.contiguous() for tensor in tensors]


def _options(inputs: Inputs) -> tuple[Tensor, float, int, int]:
    rows = torch.tensor(inputs.tables.rows_per_request, dtype=torch.int64)
    return rows, inputs.eps, _ALGORITHMS[inputs.algorithm], torch.get_num_threads()
