"""Ranks of targets and the best labels of each row, exact, in Triton, without a `[rows, labels]` matrix.

The best labels are kept as 64-bit keys: the score as an order-preserving integer, above the complement of the label. One
comparison then orders scores and puts the lower label of ties first, no two keys are equal, and shares merge by plain top-k.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from teracon_fast.kernels.configs import config, split
from teracon_fast.kernels.label_scan import scan
from teracon_fast.kernels.tiles import launch, operand, operand_dtype, power_of_two, product_tile, vector

# Keys below and above those of all scores: of no label, and of no bound.
_LOWEST_KEY, _HIGHEST_KEY = -(2**63), 2**63 - 1
EMPTY = tl.constexpr(_LOWEST_KEY)
# Most labels found in one walk; more take more walks, each below the last key of the one before.
MOST_PLACES = 128


def rank(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, precision: str = "ieee") -> Tensor:
    """Ranks int64 `[N]`, 0 the best, as `ops.linear_rank`; C for targets of a row with a logit of NaN.

    Args:
        hidden: `[R, f]`, float32, bfloat16 or float16. weight: `[C, f]`, of that dtype or float32, C below 2^31. bias: `[C]`.
        targets: int64 `[N]`. rows: int64 `[N]`, row of each target, in any order.
        precision: of products of float32: "ieee" or "tf32".
    """
    return scan(hidden, weight, bias, targets, rows, False, True, precision)[3]


@triton.jit(do_not_specialize=["count", "share"])
def topk_kernel(
    hidden, weight, bias, bounds, excluded, excluded_starts, keys, count, labels, channels, share, stride_hidden, stride_weight,
    EXCLUDE: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr, PLACES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_LABELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The best keys below each row's bound, of one share of the labels: `[shares, R, PLACES]`, best first.

    `excluded` is sorted within each row: a cursor passes over it as labels go up.
    """
    part = tl.program_id(1)
    o_rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m_rows = o_rows < count
    bound = tl.load(bounds + o_rows, mask=m_rows, other=EMPTY)
    first_tile, last_tile = part * share, tl.minimum((part + 1) * share, tl.cdiv(labels, BLOCK_LABELS))
    best = tl.full([BLOCK_ROWS, PLACES], EMPTY, tl.int64)
    if EXCLUDE:
        cursor = tl.load(excluded_starts + o_rows, mask=m_rows, other=0)
        end = tl.load(excluded_starts + o_rows + 1, mask=m_rows, other=0)
        high = end
        while tl.max(high - cursor) > 0:  # binary search for the first that is not below this share
            middle = (cursor + high) // 2
            searching = cursor < high
            below = searching & (tl.load(excluded + middle, mask=searching, other=0) < first_tile * BLOCK_LABELS)
            cursor = tl.where(below, middle + 1, cursor)
            high = tl.where(searching & (below == 0), middle, high)
        coming = tl.load(excluded + cursor, mask=cursor < end, other=2**62)
    for tile in range(first_tile, last_tile):
        o_labels = tile * BLOCK_LABELS + tl.arange(0, BLOCK_LABELS)
        m_labels = o_labels < labels
        logits = product_tile(
            hidden, weight, o_rows, o_labels, m_rows, m_labels, channels, stride_hidden, stride_weight,
            COMPUTE, PRECISION, BLOCK_ROWS, BLOCK_LABELS, DEPTH,
        )  # fmt: skip
        logits += tl.load(bias + o_labels, mask=m_labels, other=0.0).to(tl.float32)[None, :]
        bits = logits.to(tl.int32, bitcast=True)
        bits = tl.where(logits == 0.0, 0, bits)  # of both zeros
        bits = tl.where(logits != logits, 0x7FC00000, bits)  # above +inf, whatever its sign
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        new = (bits.to(tl.int64) << 32) | (0xFFFFFFFF - o_labels.to(tl.int64))[None, :]
        new = tl.where(m_labels[None, :] & (new < bound[:, None]), new, EMPTY)
        if EXCLUDE:
            while tl.min(coming) < (tile + 1) * BLOCK_LABELS:
                new = tl.where(o_labels[None, :] == coming[:, None], EMPTY, new)
                cursor += (coming < (tile + 1) * BLOCK_LABELS).to(tl.int64)
                coming = tl.load(excluded + cursor, mask=cursor < end, other=2**62)
        better = new > tl.min(best, 1)[:, None]
        if tl.max(tl.max(better.to(tl.int32), 1), 0) > 0:
            # Of two sorted lists, one reversed, the elementwise maxima are the best of both.
            best = tl.sort(tl.maximum(best, tl.flip(tl.topk(new, PLACES), 1)), 1, descending=True)
    p_keys = keys + (part.to(tl.int64) * count + o_rows)[:, None] * PLACES + tl.arange(0, PLACES)[None, :]
    tl.store(p_keys, best, mask=m_rows[:, None])


def topk(
    hidden: Tensor, weight: Tensor, bias: Tensor, k: int, exclude: Tensor, exclude_offsets: Tensor, precision: str = "ieee"
) -> tuple[Tensor, Tensor]:
    """The k best labels of each row, best first; among equal scores the lower label comes first, and NaN before all.

    Args:
        hidden, weight, bias, precision: as `rank`.
        exclude: int64 `[M]`, labels that must not be returned, those of row r at `exclude_offsets[r]:exclude_offsets[r + 1]`.

    Returns:
        scores float32 and labels int64, `[R, k]`, as `ops.linear_topk`.
    """
    device, count, labels = hidden.device, hidden.shape[0], weight.shape[0]
    sizes = config("topk", device, hidden.dtype, labels)
    places = min(power_of_two(k), MOST_PLACES, sizes.columns)
    parts, share = split(triton.cdiv(count, sizes.rows), triton.cdiv(labels, sizes.columns), device)
    wide_hidden, wide_weight, wide_bias = operand(hidden, hidden.dtype), operand(weight, hidden.dtype), vector(bias)
    exclude_offsets = exclude_offsets.contiguous()
    excluded = _sorted_by_row(exclude, exclude_offsets)
    bounds = torch.full((count,), _HIGHEST_KEY, dtype=torch.int64, device=device)
    walks = []
    for taken in range(0, k, places):
        keys = torch.empty((parts, count, places), dtype=torch.int64, device=device)
        launch(
            topk_kernel, (triton.cdiv(count, sizes.rows), parts), sizes, device, hidden=wide_hidden, weight=wide_weight,
            bias=wide_bias, bounds=bounds, excluded=excluded, excluded_starts=exclude_offsets, keys=keys, count=count,
            labels=labels, channels=hidden.shape[1], share=share, stride_hidden=wide_hidden.stride(0),
            stride_weight=wide_weight.stride(0), EXCLUDE=excluded.shape[0] > 0, COMPUTE=operand_dtype(hidden),
            PRECISION=precision, PLACES=places, BLOCK_ROWS=sizes.rows, BLOCK_LABELS=sizes.columns, DEPTH=sizes.depth,
        )  # fmt: skip
        walk = keys.transpose(0, 1).reshape(count, parts * places).topk(min(places, k - taken), 1).values
        bounds = walk[:, -1].contiguous()
        walks.append(walk)
    return _read(torch.cat(walks, 1))


def _sorted_by_row(exclude: Tensor, offsets: Tensor) -> Tensor:
    """Each row's labels in ascending order, without waiting for the device."""
    if not exclude.shape[0]:
        return exclude
    row = torch.searchsorted(offsets[1:], torch.arange(exclude.shape[0], device=exclude.device), right=True)
    ascending, order = exclude.sort()
    return ascending[row[order].argsort(stable=True)]


def _read(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and labels from keys."""
    bits = (keys >> 32).to(torch.int32)
    scores = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
    missing = (keys == _LOWEST_KEY) | scores.isneginf()
    return scores.masked_fill(missing, -torch.inf), (0xFFFFFFFF - (keys & 0xFFFFFFFF)).masked_fill(missing, -1)
