"""`masked_conv` in plain PyTorch operations: runs anywhere, in any floating dtype. The `torch` backend.

Rows are processed in chunks whose gathered taps stay in cache, so that the GEMM reads what the gather has just written.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Bytes of gathered taps per chunk: small enough for a shared cache of a few MiB, large enough that a GEMM runs at full rate.
_CHUNK_BYTES = 3 << 20
_CHUNK_BYTES_DEVICE = 1 << 30


def _chunks(rows_per_request: list[int], row_bytes: int, device: torch.device) -> Iterator[tuple[int, slice]]:
    """(request, rows) pairs that cover all rows in order; a chunk never spans two requests."""
    step = max(64, (_CHUNK_BYTES if device.type == "cpu" else _CHUNK_BYTES_DEVICE) // row_bytes)
    begin = 0
    for request, count in enumerate(rows_per_request):
        for low in range(begin, begin + count, step):
            yield request, slice(low, min(low + step, begin + count))
        begin += count


def _gather(source: Tensor, table: Tensor) -> Tensor:
    """`[n, K * width]`: rows of `source` named by `table` int32 `[n, K]`, zeros where it says -1."""
    shape = (table.shape[0], table.shape[1] * source.shape[1])
    if not source.shape[0]:
        return source.new_zeros(shape)
    flat = table.reshape(-1)
    missing = flat < 0
    rows = source.index_select(0, flat.clamp_min(0))
    if source.device.type == "cpu":
        # Few entries are -1: clear those alone instead of passing over all rows.
        rows.index_fill_(0, missing.nonzero().squeeze(1), 0)
    else:
        rows.masked_fill_(missing[:, None], 0)
    return rows.view(shape)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of LayerNorm statistics and of sums over rows: float32 for half precisions, else the activations' own."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, ln_weight: Tensor, ln_bias: Tensor, mask: Tensor, taps: Tensor,
    readers: Tensor, bags: int, rows_per_request: list[int], row_ends: Tensor, residual: Tensor | None,
    residual_rows: Tensor | None, eps: float,
    algorithm: str, save: bool, addend: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output `[rows, f_out]`; for backward (empty unless `save`) LayerNorm's input `[rows, f_out]`, mean, 1/std `[rows, 1]`."""
    rows, f_out = taps.shape[0], weight.shape[0]
    kernel, bias = weight.to(x.dtype).permute(2, 1, 0).reshape(-1, f_out), bias.to(x.dtype)
    out = x.new_empty(rows, f_out)
    kept = rows if save else 0
    statistics = statistics_dtype(x.dtype)
    ln_weight, ln_bias, mask = ln_weight.to(statistics), ln_bias.to(statistics), mask.to(statistics)
    conv = x.new_empty(kept, f_out)
    mean = x.new_empty(kept, 1, dtype=statistics)
    rstd = x.new_empty(kept, 1, dtype=statistics)
    for request, part in _chunks(rows_per_request, kernel.shape[0] * x.element_size(), x.device):
        z = torch.addmm(bias, _gather(x, taps[part]), kernel)
        if addend is not None:
            z += addend[part]
        y, mean_part, rstd_part = torch.native_layer_norm(z, (f_out,), ln_weight, ln_bias, eps)
        if save:
            conv[part], mean[part], rstd[part] = z, mean_part, rstd_part
        y = y.relu_().mul_(mask[request])
        if residual is not None and residual_rows is not None:
            y += residual.index_select(0, residual_rows[part])
        out[part] = y
    return out, conv, mean, rstd


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, ln_weight: Tensor, ln_bias: Tensor, mask: Tensor, taps: Tensor,
    readers: Tensor, bag_rows: Tensor, bag_offsets: Tensor, rows_per_request: list[int], row_ends: Tensor,
    residual_readers: Tensor | None, conv: Tensor, mean: Tensor, rstd: Tensor, eps: float, algorithm: str, need_input: bool,
    need_weight: bool, need_addend: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias, ln_weight, ln_bias, mask, residual, addend (empty where not needed).

    No scatter and no atomics: the input's gradient gathers from its readers, so results do not change from run to run.
    """
    f_out, f_in, kernel_size = weight.shape
    rows = taps.shape[0]
    sums, parameters = statistics_dtype(x.dtype), ln_weight.dtype
    mask_dtype = mask.dtype
    ln_weight, ln_bias, mask = ln_weight.to(sums), ln_bias.to(sums), mask.to(sums)
    d_kernel = weight.new_zeros(kernel_size * f_in if need_weight else 0, f_out, dtype=sums)
    d_bias = weight.new_zeros(f_out, dtype=sums)
    d_ln_weight, d_ln_bias = torch.zeros_like(ln_weight), torch.zeros_like(ln_bias)
    d_mask = torch.zeros_like(mask)
    bags = bag_offsets.shape[0] - 1
    dz = grad.new_empty(rows + bags, f_out)
    for request, part in _chunks(rows_per_request, kernel_size * f_in * x.element_size(), x.device):
        z, g = conv[part], grad[part]
        hidden = F.layer_norm(z, (f_out,), ln_weight, ln_bias, eps).relu_()
        d_mask[request] += (g * hidden).sum(0, dtype=sums)
        g = torch.ops.aten.threshold_backward((g * mask[request]).to(g.dtype), hidden, 0)
        dz_part, dw, db = torch.ops.aten.native_layer_norm_backward(
            g, z, (f_out,), mean[part], rstd[part], ln_weight, ln_bias, [True, True, True]
        )
        d_ln_weight += dw
        d_ln_bias += db
        if need_weight:
            gathered = _gather(x, taps[part])
            if sums == x.dtype:
                d_kernel.addmm_(gathered.t(), dz_part)
            else:
                d_kernel += gathered.t() @ dz_part
        d_bias += dz_part.sum(0, dtype=sums)
        dz[part] = dz_part
    if bags:
        dz[rows:] = F.embedding_bag(bag_rows, dz[:rows], bag_offsets, mode="sum", include_last_offset=True)
    d_x = _gather_gemm(dz, readers, weight.to(x.dtype).permute(2, 0, 1).reshape(-1, f_in)) if need_input else x.new_empty(0)
    d_residual = grad.new_empty(0)
    if residual_readers is not None:
        d_residual = _gather(grad, residual_readers[:, None])
    d_weight = weight.new_empty(0)
    if need_weight:
        d_weight = d_kernel.view(kernel_size, f_in, f_out).permute(2, 1, 0).contiguous().to(weight.dtype)
    d_addend = dz[:rows].clone() if need_addend else grad.new_empty(0)  # an operation's result is no part of another
    return (
        d_x, d_weight, d_bias.to(weight.dtype), d_ln_weight.to(parameters), d_ln_bias.to(parameters),
        d_mask.to(mask_dtype), d_residual, d_addend,
    )  # fmt: skip


def _gather_gemm(source: Tensor, table: Tensor, matrix: Tensor) -> Tensor:
    out = source.new_empty(table.shape[0], matrix.shape[1])
    for _, part in _chunks([table.shape[0]], matrix.shape[0] * source.element_size(), source.device):
        torch.mm(_gather(source, table[part]), matrix, out=out[part])
    return out
