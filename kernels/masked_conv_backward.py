"""Gradients of the masked convolution on packed rows in Triton: no scatter, no atomic operation, the same bits in every run.

In order: `dz`, the gradient through mask, ReLU and LayerNorm, with sums over each tile of rows for the small parameters; the sums
of rows of `dz` over bags, for shared pads; the input's gradient, gathered from the readers of each input row; the weight's, over
shares of the rows; then the ordered sums over tiles and shares.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from teracon_fast.kernels.configs import Config, config, split
from teracon_fast.kernels.masked_conv import gathered_product, packed_weight, rows_of_tile, tile_count, tiles_before
from teracon_fast.kernels.tiles import finished, launch, operand, operand_dtype, power_of_two, result, vector

# Kernels without products are bound by memory on every architecture: one size for all. Rows of a program; columns:
# channels of a program, 0 all of them; depth: rows (or tiles, or elements) of a step.
_NORM = Config(rows=64, columns=0, depth=8, warps=4, stages=1)
_BAGS = Config(rows=1, columns=64, depth=64, warps=4, stages=2)
_GATHER = Config(rows=16, columns=0, depth=1, warps=4, stages=1)
_FINISH = Config(rows=1, columns=32, depth=128, warps=4, stages=1)
_ELEMENTS = 1024
# Sums over each tile of rows: for the mask, LayerNorm's weight, its bias, the bias.
_SUMS = tl.constexpr(4)


@triton.jit(do_not_specialize=["count", "requests"])
def norm_backward_kernel(
    grad, conv, mean, rstd, ln_weight, ln_bias, mask, row_ends, dz, sums, count, requests, channels,
    BLOCK_ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """`dz` of the rows of a tile, zeros where they are padding, and the tile's `sums` `[4, f]`."""
    tile = tl.program_id(0)
    request, first, last = rows_of_tile(tile, row_ends, requests, count, BLOCK_ROWS)
    real = request < requests
    o_columns = tl.arange(0, BLOCK_COLUMNS)
    m_columns = o_columns < channels
    scale = tl.load(ln_weight + o_columns, mask=m_columns, other=0.0).to(tl.float32)[None, :]
    shift = tl.load(ln_bias + o_columns, mask=m_columns, other=0.0).to(tl.float32)[None, :]
    p_mask = mask + request.to(tl.int64) * channels + o_columns
    factor = tl.load(p_mask, mask=m_columns & real & (first < last), other=0.0).to(tl.float32)[None, :]
    # One sum per position of a step: rows are summed within a thread, and across threads once.
    d_mask = tl.zeros([STEP, BLOCK_COLUMNS], tl.float32)
    d_scale = tl.zeros([STEP, BLOCK_COLUMNS], tl.float32)
    d_shift = tl.zeros([STEP, BLOCK_COLUMNS], tl.float32)
    d_bias = tl.zeros([STEP, BLOCK_COLUMNS], tl.float32)
    for start in range(first, last, STEP):
        o_rows = start + tl.arange(0, STEP)
        m_rows = (o_rows < last) & real
        m_step = m_rows[:, None] & m_columns[None, :]
        o_step = o_rows.to(tl.int64)[:, None] * channels + o_columns[None, :]
        z = tl.load(conv + o_step, mask=m_step, other=0.0).to(tl.float32)
        g = tl.load(grad + o_step, mask=m_step, other=0.0).to(tl.float32)
        average = tl.load(mean + o_rows, mask=m_rows, other=0.0)
        inverse = tl.load(rstd + o_rows, mask=m_rows, other=0.0)
        normal = (z - average[:, None]) * inverse[:, None]
        y = normal * scale + shift
        closed = y <= 0.0
        d_mask += tl.where(closed, 0.0, g * y)
        g = tl.where(closed, 0.0, g * factor)
        d_scale += g * normal
        d_shift += g
        g *= scale
        inner = tl.sum(g * normal, 1) / channels
        d_z = inverse[:, None] * (g - (tl.sum(g, 1) / channels)[:, None] - normal * inner[:, None])
        d_z = tl.where(m_step, d_z, 0.0)
        d_bias += d_z
        tl.store(dz + o_step, d_z, mask=(o_rows < last)[:, None] & m_columns[None, :])
    p_sums = sums + tile.to(tl.int64) * _SUMS * channels + o_columns
    m_sums = m_columns & real & (first < last)
    found = (d_mask, d_scale, d_shift, d_bias)
    for which in tl.static_range(_SUMS):
        tl.store(p_sums, tl.sum(found[which], 0), mask=m_sums)
        p_sums += channels


@triton.jit(do_not_specialize=["count", "named"])
def bag_sums_kernel(
    dz, bag_rows, bag_offsets, count, named, channels, STEP: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):  # fmt: skip
    """`dz[count + b]`, some channels of it: the sum of the rows of bag b. `named`: entries of `bag_rows`."""
    bag = tl.program_id(0)
    o_columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    m_columns = o_columns < channels
    end = tl.minimum(tl.load(bag_offsets + bag + 1), named)
    total = tl.zeros([STEP, BLOCK_COLUMNS], tl.float32)
    for start in range(tl.maximum(tl.load(bag_offsets + bag), 0), end, STEP):
        o_named = start + tl.arange(0, STEP)
        o_rows = tl.load(bag_rows + o_named, mask=o_named < end, other=-1)
        m_rows = (o_rows >= 0) & (o_rows < count)
        p_rows = dz + o_rows.to(tl.int64)[:, None] * channels + o_columns[None, :]
        total += tl.load(p_rows, mask=m_rows[:, None] & m_columns[None, :], other=0.0).to(tl.float32)
    p_bag = dz + (count.to(tl.int64) + bag) * channels + o_columns
    tl.store(p_bag, tl.sum(total, 0), mask=m_columns)


@triton.jit(do_not_specialize=["count", "source_count"])
def input_kernel(
    dz, readers, weight, d_x, count, source_count, channels_in, channels_out, stride_tap, stride_column,
    TAPS: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """`d_x[r] = sum_k dz[readers[r, k]] @ weight[k].T`."""
    o_rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m_rows = o_rows < count
    o_columns = tl.arange(0, BLOCK_COLUMNS)
    m_columns = o_columns < channels_in
    steps = TAPS * tl.cdiv(channels_out, DEPTH)
    total = gathered_product(
        dz, readers, weight, o_rows, m_rows, o_columns, m_columns, steps, source_count, channels_out,
        stride_tap, 1, stride_column, TAPS, COMPUTE, PRECISION, BLOCK_ROWS, BLOCK_COLUMNS, DEPTH,
    )  # fmt: skip
    p_input = d_x + o_rows.to(tl.int64)[:, None] * channels_in + o_columns[None, :]
    tl.store(p_input, total, mask=m_rows[:, None] & m_columns[None, :])


@triton.jit(do_not_specialize=["count", "source_count", "share"])
def weight_kernel(
    x, taps, dz, shares, count, source_count, share, channels_in, channels_out,
    TAPS: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Contribution of a share of the rows to a tile of one tap's weights: `shares` `[shares, K, f_out, f_in]`."""
    part, tiles_in = tl.program_id(2), tl.cdiv(channels_in, BLOCK_IN)
    tap = tl.program_id(1) // tiles_in
    o_out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    o_in = tl.program_id(1) % tiles_in * BLOCK_IN + tl.arange(0, BLOCK_IN)
    m_out, m_in = o_out < channels_out, o_in < channels_in
    total = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    begin, end = part * share, tl.minimum((part + 1) * share, tl.cdiv(count, DEPTH))
    o_step = tl.arange(0, DEPTH)
    o_source = tl.load(taps + (begin * DEPTH + o_step).to(tl.int64) * TAPS + tap, mask=begin * DEPTH + o_step < count, other=-1)
    for step in range(begin, end):
        o_rows = step * DEPTH + o_step
        # One step early: an address that depends on a load of its own step would prevent prefetching.
        p_next = taps + (o_rows + DEPTH).to(tl.int64) * TAPS + tap
        following = tl.load(p_next, mask=o_rows + DEPTH < count, other=-1)
        m_source = (o_source >= 0) & (o_source < source_count)
        p_left = dz + o_rows.to(tl.int64)[:, None] * channels_out + o_out[None, :]
        p_right = x + o_source.to(tl.int64)[:, None] * channels_in + o_in[None, :]
        left = tl.load(p_left, mask=(o_rows < count)[:, None] & m_out[None, :], other=0.0).to(COMPUTE)
        right = tl.load(p_right, mask=m_source[:, None] & m_in[None, :], other=0.0).to(COMPUTE)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
        o_source = following
    matrix = part.to(tl.int64) * TAPS + tap
    p_share = shares + (matrix * channels_out + o_out[:, None]) * channels_in + o_in[None, :]
    tl.store(p_share, total, mask=m_out[:, None] & m_in[None, :])


@triton.jit
def _finish_weight(block, shares, d_weight, parts, matrix, TAPS: tl.constexpr, ELEMENTS: tl.constexpr):
    """Elements of `[f_out, f_in, K]`: the ordered sum over `[shares, K, f_out * f_in]`."""
    o_elements = block * ELEMENTS + tl.arange(0, ELEMENTS)
    m_elements = o_elements < matrix * TAPS
    p_shares = shares + (o_elements % TAPS).to(tl.int64) * matrix + o_elements // TAPS
    total = tl.zeros([ELEMENTS], tl.float32)
    for part in range(parts):
        total += tl.load(p_shares + part * TAPS * matrix, mask=m_elements, other=0.0)
    tl.store(d_weight + o_elements, total, mask=m_elements)


@triton.jit
def _finish_sums(
    chunk, which, sums, row_ends, d_mask, d_ln_weight, d_ln_bias, d_bias, requests, channels,
    BLOCK_ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some channels of the gradient of request `which`'s mask, then of LayerNorm's weight and bias, then of the bias."""
    o_columns = chunk * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    m_columns = o_columns < channels
    of_mask = which < requests
    begin = tiles_before(row_ends, tl.where(of_mask, which, 0), BLOCK_ROWS)
    end = tiles_before(row_ends, tl.where(of_mask, which + 1, requests), BLOCK_ROWS)
    p_sums = sums + tl.where(of_mask, 0, which - requests + 1).to(tl.int64) * channels + o_columns
    total = tl.zeros([STEP, BLOCK_COLUMNS], tl.float32)
    for start in range(begin, end, STEP):
        o_tiles = start + tl.arange(0, STEP)
        p_tiles = p_sums[None, :] + o_tiles.to(tl.int64)[:, None] * _SUMS * channels
        total += tl.load(p_tiles, mask=(o_tiles < end)[:, None] & m_columns[None, :], other=0.0)
    found = tl.sum(total, 0)
    tl.store(d_mask + which.to(tl.int64) * channels + o_columns, found, mask=m_columns & of_mask)
    tl.store(d_ln_weight + o_columns, found, mask=m_columns & (which == requests))
    tl.store(d_ln_bias + o_columns, found, mask=m_columns & (which == requests + 1))
    tl.store(d_bias + o_columns, found, mask=m_columns & (which == requests + 2))


@triton.jit(do_not_specialize=["parts", "requests"])
def finish_kernel(
    shares, d_weight, sums, row_ends, d_mask, d_ln_weight, d_ln_bias, d_bias, parts, requests, channels_in, channels_out,
    TAPS: tl.constexpr, ELEMENTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Ordered sums over the shares of the weight's gradient and the tiles of the small ones."""
    chunks = tl.cdiv(channels_out, BLOCK_COLUMNS)
    others = (requests + 3) * chunks
    if tl.program_id(0) < others:
        _finish_sums(
            tl.program_id(0) % chunks, tl.program_id(0) // chunks, sums, row_ends, d_mask, d_ln_weight, d_ln_bias, d_bias,
            requests, channels_out, BLOCK_ROWS, STEP, BLOCK_COLUMNS,
        )  # fmt: skip
    else:
        matrix = tl.cast(channels_out, tl.int64) * channels_in
        _finish_weight(tl.program_id(0) - others, shares, d_weight, parts, matrix, TAPS, ELEMENTS)


@triton.jit(do_not_specialize=["count", "source_count"])
def gather_kernel(
    source, table, out, count, source_count, channels, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):  # fmt: skip
    """`out[r] = source[table[r]]`, zeros where the entry is not the number of a row."""
    o_rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m_rows = o_rows < count
    o_columns = tl.arange(0, BLOCK_COLUMNS)[None, :]
    o_source = tl.load(table + o_rows, mask=m_rows, other=-1)
    m_source = (o_source >= 0) & (o_source < source_count)
    p_source = source + o_source.to(tl.int64)[:, None] * channels + o_columns
    values = tl.load(p_source, mask=m_source[:, None] & (o_columns < channels), other=0.0)
    p_out = out + o_rows.to(tl.int64)[:, None] * channels + o_columns
    tl.store(p_out, values, mask=m_rows[:, None] & (o_columns < channels))


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, ln_weight: Tensor, ln_bias: Tensor, mask: Tensor, taps: Tensor, readers: Tensor,
    bag_rows: Tensor, bag_offsets: Tensor, row_ends: Tensor, residual_readers: Tensor | None, conv: Tensor, mean: Tensor,
    rstd: Tensor, need_input: bool, precision: str = "ieee", need_weight: bool = True, need_addend: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `sum(grad * output)`.

    Args:
        grad: `[rows, f_out]` of x's dtype.
        readers, bag_rows, bag_offsets, residual_readers: as `packing.TapTable` and `ResidualTable`; None: no residual gradient.
        conv, mean, rstd: of `masked_conv.forward`. Others: as there. Padding rows are not read.

    Returns:
        d(x), d(weight), d(bias), d(ln_weight), d(ln_bias), d(mask), d(residual), d(addend) in the dtypes of those, that of the
        bias in weight's; empty where not needed.
    """
    device, dtype = x.device, x.dtype
    (count, kernel_size), (f_out, f_in, _), requests = taps.shape, weight.shape, mask.shape[0]
    bags, columns = bag_offsets.shape[0] - 1, power_of_two(f_out)
    wide_grad, taps, row_ends = operand(grad.contiguous(), dtype), taps.contiguous(), row_ends.contiguous()
    dz = result((count + bags, f_out), dtype, device)[0]
    tiles = tile_count(count, requests, _NORM.rows)
    sums = torch.empty((tiles, _SUMS.value, f_out), dtype=torch.float32, device=device)
    # As far as possible a thread has the same share of a step for any number of channels.
    norm = replace(_NORM, warps=max(_NORM.warps, columns // 64))
    launch(
        norm_backward_kernel, (tiles,), norm, device, grad=wide_grad, conv=operand(conv.contiguous(), dtype),
        mean=mean, rstd=rstd, ln_weight=vector(ln_weight), ln_bias=vector(ln_bias), mask=vector(mask), row_ends=row_ends,
        dz=dz, sums=sums, count=count, requests=requests, channels=f_out, BLOCK_ROWS=_NORM.rows, STEP=_NORM.depth,
        BLOCK_COLUMNS=columns,
    )  # fmt: skip
    dz = operand(dz, dtype)
    launch(
        bag_sums_kernel, (bags, triton.cdiv(f_out, _BAGS.columns)), _BAGS, device, dz=dz, bag_rows=bag_rows.contiguous(),
        bag_offsets=bag_offsets.contiguous(), count=count, named=bag_rows.shape[0], channels=f_out, STEP=_BAGS.depth,
        BLOCK_COLUMNS=_BAGS.columns,
    )  # fmt: skip
    dz = operand(dz, dtype)
    d_x = _input_gradient(dz, weight, readers, dtype, precision) if need_input else x.new_empty(0)
    shares = _weight_shares(x, taps, dz, precision) if need_weight else x.new_empty(0, dtype=torch.float32)
    shape = (f_out, f_in, kernel_size) if need_weight else (0,)
    d_weight, d_bias = result(shape, weight.dtype, device), result((f_out,), weight.dtype, device)
    d_ln_weight, d_ln_bias = (result((f_out,), ln_weight.dtype, device) for _ in range(2))
    d_mask = result((requests, f_out), mask.dtype, device)
    programs = (requests + 3) * triton.cdiv(f_out, _FINISH.columns) + triton.cdiv(d_weight.numel(), _ELEMENTS)
    launch(
        finish_kernel, (programs,), _FINISH, device, shares=shares, d_weight=d_weight, sums=sums, row_ends=row_ends,
        d_mask=d_mask, d_ln_weight=d_ln_weight, d_ln_bias=d_ln_bias, d_bias=d_bias, parts=shares.shape[0], requests=requests,
        channels_in=f_in, channels_out=f_out, TAPS=kernel_size, ELEMENTS=_ELEMENTS, BLOCK_ROWS=_NORM.rows,
        STEP=_FINISH.depth, BLOCK_COLUMNS=_FINISH.columns,
    )  # fmt: skip
    # A copy: results of an operation must not share memory.
    d_addend = dz[:count].to(dtype, copy=True) if need_addend else x.new_empty(0)
    d_residual = x.new_empty(0)
    if residual_readers is not None:
        d_residual = result((residual_readers.shape[0], f_out), dtype, device)
        launch(
            gather_kernel, (triton.cdiv(residual_readers.shape[0], _GATHER.rows),), _GATHER, device, source=wide_grad,
            table=residual_readers.contiguous(), out=d_residual, count=residual_readers.shape[0], source_count=count,
            channels=f_out, BLOCK_ROWS=_GATHER.rows, BLOCK_COLUMNS=columns,
        )  # fmt: skip
        d_residual = finished(d_residual, dtype)
    return (
        d_x, finished(d_weight, weight.dtype), finished(d_bias, weight.dtype), finished(d_ln_weight, ln_weight.dtype),
        finished(d_ln_bias, ln_weight.dtype), finished(d_mask, mask.dtype), d_residual, d_addend,
    )  # fmt: skip


def _input_gradient(dz: Tensor, weight: Tensor, readers: Tensor, dtype: torch.dtype, precision: str) -> Tensor:
    """`[rows_in, f_in]` in `dtype`; `dz` includes the sums of bags."""
    (f_out, f_in, kernel_size), count = weight.shape, readers.shape[0]
    sizes = config("conv_input", dz.device, dtype, f_in)
    kernel = packed_weight(weight, dtype)
    d_x = result((count, f_in), dtype, dz.device)
    launch(
        input_kernel, (triton.cdiv(count, sizes.rows),), sizes, dz.device, dz=dz, readers=readers.contiguous(), weight=kernel,
        d_x=d_x, count=count, source_count=dz.shape[0], channels_in=f_in, channels_out=f_out, stride_tap=kernel.stride(0),
        stride_column=kernel.stride(1), TAPS=kernel_size, COMPUTE=operand_dtype(dz), PRECISION=precision,
        BLOCK_ROWS=sizes.rows, BLOCK_COLUMNS=power_of_two(f_in), DEPTH=sizes.depth,
    )  # fmt: skip
    return finished(d_x, dtype)


def _weight_shares(x: Tensor, taps: Tensor, dz: Tensor, precision: str) -> Tensor:
    """Parts of the weight's gradient, float32 `[shares, K, f_out, f_in]`."""
    (count, kernel_size), f_out, f_in, device = taps.shape, dz.shape[1], x.shape[1], x.device
    sizes = config("conv_weight", device, x.dtype, f_out)
    owners = (triton.cdiv(f_out, sizes.rows), kernel_size * triton.cdiv(f_in, sizes.columns))
    parts, share = split(owners[0] * owners[1], triton.cdiv(count, sizes.depth), device)
    shares = torch.empty((parts, kernel_size, f_out, f_in), dtype=torch.float32, device=device)
    launch(
        weight_kernel, (*owners, parts), sizes, device, x=operand(x.contiguous(), x.dtype), taps=taps, dz=dz, shares=shares,
        count=count, source_count=x.shape[0], share=share, channels_in=f_in, channels_out=f_out, TAPS=kernel_size,
        COMPUTE=operand_dtype(x), PRECISION=precision, BLOCK_OUT=sizes.rows, BLOCK_IN=sizes.columns, DEPTH=sizes.depth,
    )  # fmt: skip
    return shares
