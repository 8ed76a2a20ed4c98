"""`masked_conv` in plain PyTorch operations: runs anywhere, in any floating dtype. The `torch` backend.

Rows are processed in chunks whose gathered taps stay in cache, so that the GEMM reads what the gather has just written.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from teracon_fast.ops.checks import sums_dtype
from teracon_fast.ops.masked_conv.api import Backward, Gradients, Inputs, Parameters, Results, room
from teracon_fast.ops.rows import add_product, bag_sums, chunks, gather_taps, input_gradient, kernel_of, weight_gradient


def forward(inputs: Inputs) -> Results:
    """The output, and what backward needs."""
    x, (weight, bias, *others), tables, residual, addend, eps, *_ = inputs
    results, f_out = room(inputs), weight.shape[0]
    out, (conv, mean, rstd) = results
    kernel, bias = kernel_of(weight, x.dtype), bias.to(x.dtype)
    ln_weight, ln_bias, mask = (other.to(sums_dtype(x.dtype)) for other in others)
    for request, part in chunks(tables.rows_per_request, kernel.shape[0] * x.element_size(), x.device):
        z = torch.addmm(bias, gather_taps(x, tables.taps[part]), kernel)
        if addend is not None:
            z += addend[part]
        y, mean_part, rstd_part = torch.native_layer_norm(z, (f_out,), ln_weight, ln_bias, eps)
        if inputs.save:
            conv[part], mean[part], rstd[part] = z, mean_part, rstd_part
        y = y.relu_().mul_(mask[request])
        if residual is not None and tables.residual_rows is not None:
            y += residual.index_select(0, tables.residual_rows[part])
        out[part] = y
    return results


def backward(backward: Backward) -> Gradients:
    """No scatter and no atomics: the input's gradient gathers from its readers, so results do not change from run to run."""
    grad, (x, parameters, tables, *_), (conv, mean, rstd), need_x, need_weight, need_residual, need_addend = backward
    weight, sums = parameters.weight, sums_dtype(x.dtype)
    (f_out, f_in, kernel_size), rows = weight.shape, tables.taps.shape[0]
    ln_weight, ln_bias, mask = (parameter.to(sums) for parameter in parameters[2:])
    d_kernel = weight.new_zeros(kernel_size * f_in if need_weight else 0, f_out, dtype=sums)
    d_bias = weight.new_zeros(f_out, dtype=sums)
    d_ln_weight, d_ln_bias, d_mask = (torch.zeros_like(parameter) for parameter in (ln_weight, ln_bias, mask))
    dz = grad.new_empty(rows + len(tables.bag_offsets) - 1, f_out)
    for request, part in chunks(tables.rows_per_request, kernel_size * f_in * x.element_size(), x.device):
        z, g = conv[part], grad[part]
        hidden = F.layer_norm(z, (f_out,), ln_weight, ln_bias, backward.inputs.eps).relu_()
        d_mask[request] += (g * hidden).sum(0, dtype=sums)
        g = torch.ops.aten.threshold_backward((g * mask[request]).to(g.dtype), hidden, 0)
        dz_part, dw, db = torch.ops.aten.native_layer_norm_backward(
            g, z, (f_out,), mean[part], rstd[part], ln_weight, ln_bias, [True, True, True]
        )
        d_ln_weight += dw
        d_ln_bias += db
        if need_weight:
            add_product(d_kernel, gather_taps(x, tables.taps[part]), dz_part)
        d_bias += dz_part.sum(0, dtype=sums)
        dz[part] = dz_part
    if len(dz) > rows:
        dz[rows:] = bag_sums(dz[:rows], tables.bag_rows, tables.bag_offsets)
    readers = tables.residual_readers
    totals = (d_bias, d_ln_weight, d_ln_bias, d_mask)
    narrow = (total.to(parameter.dtype) for total, parameter in zip(totals, parameters[1:], strict=True))
    return Gradients(
        input_gradient(dz, tables.readers, weight) if need_x else x.new_empty(0),
        Parameters(weight_gradient(d_kernel, weight) if need_weight else weight.new_empty(0), *narrow),
        gather_taps(grad, readers[:, None]) if need_residual and readers is not None else grad.new_empty(0),
        dz[:rows].clone() if need_addend else grad.new_empty(0),  # an operation's result is no part of another
    )
