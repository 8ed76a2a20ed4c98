"""`masked_conv` by Triton kernels. The `triton` backend.

Nothing waits for the device, so a table entry out of range raises no error: it reads zeros.
"""

from __future__ import annotations

from teracon_fast.kernels import masked_conv as kernels
from teracon_fast.kernels import masked_conv_backward
from teracon_fast.kernels.tiles import dot_precision
from teracon_fast.ops.backends import BackendError
from teracon_fast.ops.masked_conv.api import Backward, Gradients, Inputs, Kept, Parameters, Results


def forward(inputs: Inputs) -> Results:
    """As `torch.forward`; rows from `row_ends[-1]` on are left unwritten.

    Raises:
        BackendError: for more channels than a program's registers hold.
    """
    x, parameters, tables, residual, addend, eps, *_ = inputs
    most = max(parameters.weight.shape[:2])
    if most > kernels.MOST_CHANNELS:
        raise BackendError(f"masked_conv: backend 'triton' takes up to {kernels.MOST_CHANNELS} channels, got {most}")
    out, *kept = kernels.forward(
        x, *parameters, tables.taps, tables.row_ends, residual, tables.residual_rows, eps, inputs.save, dot_precision(x.device),
        addend,
    )  # fmt: skip
    return Results(out, Kept(*kept))


def backward(backward: Backward) -> Gradients:
    """As `torch.backward`."""
    grad, (x, parameters, tables, *_), kept, need_x, need_weight, need_residual, need_addend = backward
    weight, _, *others = parameters
    d_x, *gradients, d_residual, d_addend = masked_conv_backward.backward(
        grad, x, weight, *others, tables.taps, tables.readers, tables.bag_rows, tables.bag_offsets, tables.row_ends,
        tables.residual_readers if need_residual else None, *kept, need_x, dot_precision(x.device), need_weight, need_addend,
    )  # fmt: skip
    return Gradients(d_x, Parameters(*gradients), d_residual, d_addend)
