"""The masked convolution on packed rows in Triton: products, bias, LayerNorm, ReLU, mask and residual in one kernel.

An implicit GEMM (Dukhan 2019, arXiv 1907.02129): a program owns some output rows with all their channels, gathers the rows that
each tap reads, and has whole rows in registers for LayerNorm. Backward is in `masked_conv_backward.py`.

A tile of rows never spans two requests, so it has one mask. The rows of a tile follow from `row_ends` on the device; the host
knows only how many rows there are. A table entry that is not the number of a row, such as -1, reads zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from teracon_fast.kernels.configs import config
from teracon_fast.kernels.tiles import finished, launch, operand, operand_dtype, power_of_two, result, vector

# The most channels whose rows fit the registers of a program.
MOST_CHANNELS = 512
# Ends of requests read at once.
_LANES = tl.constexpr(16)


@triton.jit
def tiles_before(row_ends, request, BLOCK_ROWS: tl.constexpr):
    """Number of the first tile of a request."""
    total = tl.full([], 0, tl.int32)
    for done in range(0, request, _LANES):
        o_requests = done + tl.arange(0, _LANES)
        m_requests = o_requests < request
        ends = tl.load(row_ends + o_requests, mask=m_requests, other=0)
        starts = tl.load(row_ends + o_requests - 1, mask=m_requests & (o_requests > 0), other=0)
        total += tl.sum(tl.cdiv(ends - starts, BLOCK_ROWS))
    return total


@triton.jit
def rows_of_tile(tile, row_ends, requests, count, BLOCK_ROWS: tl.constexpr):
    """Request of a tile, its first row and where its rows end; surplus tiles have none.

    Padding, rows from the last request's end to `count`, is request number `requests`.
    """
    request, first, last = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    before = tl.full([], 0, tl.int32)
    for done in range(0, requests + 1, _LANES):
        o_requests = done + tl.arange(0, _LANES)
        m_requests = o_requests < requests
        ends = tl.load(row_ends + o_requests, mask=m_requests, other=count)
        starts = tl.load(row_ends + o_requests - 1, mask=(o_requests > 0) & (o_requests <= requests), other=count)
        starts = tl.where(o_requests == 0, 0, starts)
        tiles = tl.cdiv(ends - starts, BLOCK_ROWS)
        o_tile = tile - (before + tl.cumsum(tiles) - tiles)
        here = (o_tile >= 0) & (o_tile < tiles)
        begins = starts + o_tile * BLOCK_ROWS
        request += tl.sum(tl.where(here, o_requests, 0))
        first += tl.sum(tl.where(here, begins, 0))
        last += tl.sum(tl.where(here, tl.minimum(begins + BLOCK_ROWS, ends), 0))
        before += tl.sum(tiles)
    return request, first, last


def tile_count(count: int, requests: int, block_rows: int) -> int:
    """Upper bound on the tiles of `count` rows of `requests` requests and padding."""
    return int(triton.cdiv(count, block_rows)) + requests


@triton.jit
def gathered_product(
    source, table, weight, o_rows, m_rows, o_columns, m_columns, steps, source_count, channels,
    stride_tap, stride_channel, stride_column,
    TAPS: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """`sum over taps k of source[table[o_rows, k]] @ weight[k]`, fp32 `[BLOCK_ROWS, BLOCK_COLUMNS]`.

    `steps`: TAPS for every DEPTH channels, or 0 in a tile without rows.
    """
    p_table = table + o_rows.to(tl.int64) * TAPS
    p_weight = weight + o_columns.to(tl.int64) * stride_column
    # Loaded beforehand: an address that depends on a load within the loop would prevent prefetching.
    rows = (tl.load(p_table, mask=m_rows, other=-1),)
    for number in tl.static_range(1, TAPS):
        rows = rows + (tl.load(p_table + number, mask=m_rows, other=-1),)  # type: ignore[assignment]
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    # One loop over channels and taps, so that loads of the next tap overlap products of this one.
    for step in range(steps):
        tap = step % TAPS
        o_depth = step // TAPS * DEPTH + tl.arange(0, DEPTH)
        m_depth = o_depth < channels
        o_source = rows[0]
        for another in tl.static_range(1, TAPS):
            o_source = tl.where(tap == another, rows[another], o_source)
        m_source = (o_source >= 0) & (o_source < source_count)
        p_source = source + o_source.to(tl.int64) * channels
        left = tl.load(p_source[:, None] + o_depth[None, :], mask=m_source[:, None] & m_depth[None, :], other=0.0)
        o_weight = tap.to(tl.int64) * stride_tap + o_depth.to(tl.int64) * stride_channel
        right = tl.load(p_weight[None, :] + o_weight[:, None], mask=m_depth[:, None] & m_columns[None, :], other=0.0)
        total = tl.dot(left.to(COMPUTE), right.to(COMPUTE), total, input_precision=PRECISION)
    return total


@triton.jit
def in_pieces(tile, PIECES: tl.constexpr, SPANS: tl.constexpr):
    """The tile's columns as PIECES tiles, a power of two of them; piece p has `columns_of_piece(p)`."""
    if PIECES == 1:
        return (tile,)
    else:
        ROWS: tl.constexpr = tile.shape[0]
        HALF: tl.constexpr = tile.shape[1] // 2
        halves = tl.permute(tl.reshape(tile, [ROWS, SPANS, 2, HALF // SPANS]), [0, 1, 3, 2])
        left, right = tl.split(halves)
        left, right = tl.reshape(left, [ROWS, HALF]), tl.reshape(right, [ROWS, HALF])
        return in_pieces(left, PIECES // 2, SPANS) + in_pieces(right, PIECES // 2, SPANS)


@triton.jit
def columns_of_piece(piece, PIECES: tl.constexpr, SPANS: tl.constexpr, COLUMNS: tl.constexpr):
    """Equally many from each of SPANS spans, so that warps side by side each hold a part of every piece in registers."""
    WIDTH: tl.constexpr = COLUMNS // (PIECES * SPANS)
    o_piece = tl.arange(0, COLUMNS // PIECES)
    return o_piece // WIDTH * (COLUMNS // SPANS) + piece * WIDTH + o_piece % WIDTH


@triton.jit(do_not_specialize=["count", "source_count", "residual_count", "requests"])
def forward_kernel(
    x, taps, weight, bias, ln_weight, ln_bias, mask, row_ends, addend, residual, residual_rows, out, conv, mean, rstd,
    count, source_count, residual_count, requests, channels_in, channels_out, stride_tap, stride_channel, eps,
    ADDEND: tl.constexpr, RESIDUAL: tl.constexpr, SAVE: tl.constexpr, WHOLE: tl.constexpr, PIECES: tl.constexpr,
    TAPS: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Output rows of a tile, 0 for padding; with SAVE also what backward needs of the others."""
    request, first, last = rows_of_tile(tl.program_id(0), row_ends, requests, count, BLOCK_ROWS)
    o_rows = first + tl.arange(0, BLOCK_ROWS)
    m_out = o_rows < last
    last = tl.where(request < requests, last, first)
    m_rows = o_rows < last
    o_columns = tl.arange(0, BLOCK_COLUMNS)
    m_columns = o_columns < channels_out
    steps = tl.where(first < last, TAPS * tl.cdiv(channels_in, DEPTH), 0)
    total = gathered_product(
        x, taps, weight, o_rows, m_rows, o_columns, m_columns, steps, source_count, channels_in,
        stride_tap, stride_channel, 1, TAPS, COMPUTE, PRECISION, BLOCK_ROWS, BLOCK_COLUMNS, DEPTH,
    )  # fmt: skip
    # In pieces: vectors of channels and rows of the residual need registers in addition to those of the sums.
    # A warp holds at most 256 channels of a product.
    SPANS: tl.constexpr = (BLOCK_COLUMNS + 255) // 256
    sums = in_pieces(total, PIECES, SPANS)
    z = ()
    average = tl.zeros([BLOCK_ROWS], tl.float32)
    for piece in tl.static_range(PIECES):
        o_piece = columns_of_piece(piece, PIECES, SPANS, BLOCK_COLUMNS)
        m_piece = o_piece < channels_out
        part = sums[piece] + tl.load(bias + o_piece, mask=m_piece, other=0.0).to(tl.float32)[None, :]
        if ADDEND:
            p_addend = addend + o_rows.to(tl.int64)[:, None] * channels_out + o_piece[None, :]
            part += tl.load(p_addend, mask=m_rows[:, None] & m_piece[None, :], other=0.0).to(tl.float32)
        average += tl.sum(part, 1)
        if SAVE:
            p_conv = conv + o_rows.to(tl.int64)[:, None] * channels_out + o_piece[None, :]
            tl.store(p_conv, part, mask=m_rows[:, None] & m_piece[None, :])
        z = z + (part,)  # type: ignore[assignment]
    average /= channels_out
    variance = tl.zeros([BLOCK_ROWS], tl.float32)
    for piece in tl.static_range(PIECES):
        part = z[piece] - average[:, None]
        if not WHOLE:
            part = tl.where((columns_of_piece(piece, PIECES, SPANS, BLOCK_COLUMNS) < channels_out)[None, :], part, 0.0)
        variance += tl.sum(part * part, 1)
    inverse = tl.rsqrt(variance / channels_out + eps)
    if SAVE:
        tl.store(mean + o_rows, average, mask=m_rows)
        tl.store(rstd + o_rows, inverse, mask=m_rows)
    if RESIDUAL:
        o_added = tl.load(residual_rows + o_rows, mask=m_rows, other=-1)
        m_added = (o_added >= 0) & (o_added < residual_count)
        p_residual = residual + o_added.to(tl.int64) * channels_out
    for piece in tl.static_range(PIECES):
        o_piece = columns_of_piece(piece, PIECES, SPANS, BLOCK_COLUMNS)
        m_piece = o_piece < channels_out
        y = (z[piece] - average[:, None]) * inverse[:, None]
        y *= tl.load(ln_weight + o_piece, mask=m_piece, other=0.0).to(tl.float32)[None, :]
        y += tl.load(ln_bias + o_piece, mask=m_piece, other=0.0).to(tl.float32)[None, :]
        # tl.maximum may drop NaNs.
        y = tl.where(y <= 0.0, 0.0, y)
        p_mask = mask + request.to(tl.int64) * channels_out + o_piece
        y *= tl.load(p_mask, mask=m_piece & (first < last), other=0.0).to(tl.float32)[None, :]
        if RESIDUAL:
            p_added = p_residual[:, None] + o_piece[None, :]
            y += tl.load(p_added, mask=m_added[:, None] & m_piece[None, :], other=0.0).to(tl.float32)
        p_out = out + o_rows.to(tl.int64)[:, None] * channels_out + o_piece[None, :]
        tl.store(p_out, y, mask=m_out[:, None] & m_piece[None, :])


def packed_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`[K, f_in, f_out]` of a weight `[f_out, f_in, K]`, rounded once to the dtype of products."""
    f_out, f_in, taps = weight.shape
    packed = torch.empty((taps, f_in, f_out), dtype=dtype, device=weight.device)
    return operand(packed.copy_(weight.permute(2, 1, 0)), dtype)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, ln_weight: Tensor, ln_bias: Tensor, mask: Tensor, taps: Tensor,
    row_ends: Tensor, residual: Tensor | None, residual_rows: Tensor | None, eps: float, save: bool, precision: str = "ieee",
    addend: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`mask[q(r)] * relu(LayerNorm(bias + sum_k weight[:, :, k] @ x[taps[r, k]] (+ addend[r]))) (+ residual[residual_rows[r]])`.

    Args:
        x, weight, bias, ln_weight, ln_bias, mask, residual, addend, eps: as `ops.masked_conv`, x in float32, bfloat16 or float16,
            f_out at most `MOST_CHANNELS`.
        taps, row_ends, residual_rows: as `packing.TapTable` and `ResidualTable`. Padding rows are 0 in the output, and not
            written in what is saved.
        save: whether backward will follow. precision: of products of float32: "ieee" or "tf32".

    Returns:
        The output and LayerNorm's input, `[rows, f_out]` in x's dtype, its mean and 1/std, float32 `[rows, 1]`; the last three
        empty without `save`.
    """
    device, dtype = x.device, x.dtype
    (count, kernel_size), (f_out, f_in, _), requests = taps.shape, weight.shape, mask.shape[0]
    sizes, columns = config("conv", device, dtype, f_out), power_of_two(f_out)
    kernel = packed_weight(weight, dtype)
    kept = count if save else 0
    out, conv = result((count, f_out), dtype, device), result((kept, f_out), dtype, device)
    mean, rstd = (torch.empty((kept, 1), dtype=torch.float32, device=device) for _ in range(2))
    wide = operand(x.contiguous(), dtype)
    added = wide if residual is None else operand(residual.contiguous(), dtype)
    before = wide if addend is None else operand(addend.contiguous(), dtype)
    launch(
        forward_kernel, (tile_count(count, requests, sizes.rows),), sizes, device, x=wide, taps=taps.contiguous(),
        weight=kernel, bias=vector(bias), ln_weight=vector(ln_weight), ln_bias=vector(ln_bias), mask=vector(mask),
        row_ends=row_ends, addend=before, residual=added,
        residual_rows=taps if residual_rows is None else residual_rows.contiguous(),
        out=out, conv=conv, mean=mean, rstd=rstd, count=count, source_count=x.shape[0], residual_count=added.shape[0],
        requests=requests, channels_in=f_in, channels_out=f_out, stride_tap=kernel.stride(0), stride_channel=kernel.stride(1),
        eps=float(eps), ADDEND=addend is not None, RESIDUAL=residual is not None, SAVE=save, WHOLE=f_out == columns,
        PIECES=max(columns // (sizes.columns or columns), 1), TAPS=kernel_size,
        COMPUTE=operand_dtype(x), PRECISION=precision, BLOCK_ROWS=sizes.rows, BLOCK_COLUMNS=columns, DEPTH=sizes.depth,
    )  # fmt: skip
    return finished(out, dtype), finished(conv, dtype), mean, rstd
