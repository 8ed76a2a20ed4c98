"""Cross-entropy of a linear head in Triton: no `[rows, labels]` matrix, no atomic operation, the same bits in every run.

`loss[n] = logsumexp_c logit[rows[n], c] - logit[rows[n], targets[n]]`, `logit = hidden @ weight.T + bias`. Forward is one
walk over the labels with a running maximum and sum (online softmax, Milakov & Gimelshein 2018, arXiv 1805.02867). Backward
forms each tile of logits again, turns it into the tile of their gradients
`softmax * sum_{n in r} g[n] - sum_{n in r} g[n] * onehot(targets[n])` and multiplies that at once. Tiles without a
probability of some size can be left out (gradient filtering, Wijmans et al. 2024, arXiv 2411.09009).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from teracon_fast.kernels.configs import Config, config, split
from teracon_fast.kernels.label_scan import scan
from teracon_fast.kernels.tiles import (
    Targets,
    by_row,
    feature_tile,
    finished,
    launch,
    operand,
    operand_dtype,
    power_of_two,
    product_tile,
    result,
    vector,
)

_SUMS = Config(rows=128, columns=1, depth=1, warps=4, stages=1)


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, predictions: bool, precision: str = "ieee"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses, statistics and, with `predictions`, best labels and ranks.

    A row with a logit of NaN or +inf has losses of NaN; with NaN, any best label and rank C.

    Args:
        hidden: `[R, f]`, float32, bfloat16 or float16. weight: `[C, f]`, of that dtype or float32, C below 2^31. bias: `[C]`.
        targets: int64 `[N]`. rows: int64 `[N]`, row of each target, in any order.
        precision: of products of float32: "ieee" or "tf32".

    Returns:
        losses float32 `[N]`; each row's maximum and sum of `exp(logit - maximum)`, float32 `[2, R]`; best labels int64 `[R]` and
        ranks int64 `[N]` as in `ops.CrossEntropy`, empty without `predictions`.
    """
    return scan(hidden, weight, bias, targets, rows, True, predictions, precision)


@triton.jit(do_not_specialize=["count"])
def row_sums_kernel(grad, order, starts, sums, count, BLOCK: tl.constexpr):
    """The sum of each row's gradients, in the order of the targets' numbers."""
    o_rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_rows = o_rows < count
    start = tl.load(starts + o_rows, mask=m_rows, other=0)
    end = tl.load(starts + o_rows + 1, mask=m_rows, other=0)
    total = tl.zeros([BLOCK], tl.float32)
    for turn in range(tl.max(end - start)):
        number = tl.load(order + start + turn, mask=start + turn < end, other=0)
        total += tl.load(grad + number, mask=start + turn < end, other=0.0)
    tl.store(sums + o_rows, total, mask=m_rows)


@triton.jit
def _of_rows(statistics, sums, starts, o_rows, m_rows, count):
    """Maximum, sum of exponentials, factor of the probabilities, first and last target of each row."""
    maximum = tl.load(statistics + o_rows, mask=m_rows, other=0.0)
    total = tl.load(statistics + count + o_rows, mask=m_rows, other=1.0)
    factor = tl.load(sums + o_rows, mask=m_rows, other=0.0) / total
    return (
        maximum, total, factor,
        tl.load(starts + o_rows, mask=m_rows, other=0), tl.load(starts + o_rows + 1, mask=m_rows, other=0),
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "share"])
def backward_kernel(
    hidden, weight, bias, grad, targets, order, starts, statistics, sums, gradient, d_bias,
    count, labels, channels, share, stride_hidden, stride_weight, filter_eps,
    BY_LABELS: tl.constexpr, PRODUCT: tl.constexpr, FILTER: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_OWN: tl.constexpr, BLOCK_WALK: tl.constexpr, DEPTH: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Some channels of the gradient of the rows of a tile, walking over a share of the labels, or the other way round.

    With BY_LABELS a program owns labels and walks over rows: `gradient` is d(weight), and `d_bias` is filled too. Without,
    `gradient` is d(hidden). Tiles are `[own, walk]` in both. Both outputs are `[shares, own, ...]`.
    """
    ROWS: tl.constexpr = 0 if BY_LABELS else 1  # dimension that a row's value is broadcast along
    LABELS: tl.constexpr = 1 if BY_LABELS else 0
    part = tl.program_id(1)
    o_own = tl.program_id(0) * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    o_features = tl.program_id(2) * FEATURES + tl.arange(0, FEATURES)
    if BY_LABELS:
        own, walk, stride_own, stride_walk, own_count, walk_count = (
            weight, hidden, stride_weight, stride_hidden, labels, count,
        )  # fmt: skip
    else:
        own, walk, stride_own, stride_walk, own_count, walk_count = (
            hidden, weight, stride_hidden, stride_weight, count, labels,
        )  # fmt: skip
    m_own = o_own < own_count
    if BY_LABELS:
        own_bias = tl.load(bias + o_own, mask=m_own, other=0.0).to(tl.float32)
        bias_sum = tl.zeros([BLOCK_OWN], tl.float32)
    else:
        maximum, total, factor, start, end = _of_rows(statistics, sums, starts, o_own, m_own, count)
    if PRODUCT:
        gradient_sum = tl.zeros([BLOCK_OWN, FEATURES], tl.float32)
    for tile in range(part * share, tl.minimum((part + 1) * share, tl.cdiv(walk_count, BLOCK_WALK))):
        o_walk = tile * BLOCK_WALK + tl.arange(0, BLOCK_WALK)
        m_walk = o_walk < walk_count
        logits = product_tile(
            own, walk, o_own, o_walk, m_own, m_walk, channels, stride_own, stride_walk,
            COMPUTE, PRECISION, BLOCK_OWN, BLOCK_WALK, DEPTH,
        )  # fmt: skip
        if BY_LABELS:
            maximum, total, factor, start, end = _of_rows(statistics, sums, starts, o_walk, m_walk, count)
            logits += own_bias[:, None]
            o_labels, first, BLOCK_LABELS = o_own, tl.program_id(0) * BLOCK_OWN, BLOCK_OWN
        else:
            logits += tl.load(bias + o_walk, mask=m_walk, other=0.0).to(tl.float32)[None, :]
            o_labels, first, BLOCK_LABELS = o_walk, tile * BLOCK_WALK, BLOCK_WALK
        m_tile = m_own[:, None] & m_walk[None, :]
        exponentials = tl.exp(logits - tl.expand_dims(maximum, ROWS))
        d_logits = tl.where(m_tile, exponentials * tl.expand_dims(factor, ROWS), 0.0)
        holds_target = tl.full([], 0, tl.int32)
        for turn in range(tl.max(end - start)):
            m_turn = start + turn < end
            number = tl.load(order + start + turn, mask=m_turn, other=0)
            target = tl.load(targets + number, mask=m_turn, other=-1).to(tl.int32)
            share_of_row = tl.load(grad + number, mask=m_turn, other=0.0)
            hit = tl.expand_dims(target, ROWS) == tl.expand_dims(o_labels, LABELS)
            d_logits = tl.where(hit, d_logits - tl.expand_dims(share_of_row, ROWS), d_logits)
            if FILTER:
                here = (target >= first) & (target < first + BLOCK_LABELS)
                holds_target = tl.maximum(holds_target, tl.max(here.to(tl.int32)))
        if BY_LABELS:
            bias_sum += tl.sum(d_logits, 1)
        if PRODUCT:
            needed = True
            if FILTER:
                # Not `>=`, which is false for NaN.
                counts = m_tile & ((exponentials < tl.expand_dims(filter_eps * total, ROWS)) == 0)
                needed = (holds_target + tl.max(tl.max(counts.to(tl.int32), 1), 0)) > 0
            if needed:
                values = feature_tile(walk, o_walk, m_walk, o_features, channels, stride_walk, COMPUTE)
                gradient_sum = tl.dot(d_logits.to(COMPUTE), values, gradient_sum, input_precision=PRECISION)
    if PRODUCT:
        p_gradient = gradient + (part.to(tl.int64) * own_count + o_own)[:, None] * channels + o_features[None, :]
        tl.store(p_gradient, gradient_sum, mask=m_own[:, None] & (o_features < channels)[None, :])
    if BY_LABELS:
        tl.store(d_bias + part.to(tl.int64) * own_count + o_own, bias_sum, mask=m_own & (tl.program_id(2) == 0))


def backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, statistics: Tensor,
    need_hidden: bool, need_weight: bool, filter_eps: float = 0.0, precision: str = "ieee", need_bias: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `sum(grad * losses)`.

    Args:
        grad: float32 `[N]`. statistics: of `forward`. Others: as in `forward`.
        need_hidden, need_weight, need_bias: which gradients are wanted. That of the bias is free with that of the weight, and
            costs the logits once more without it.
        filter_eps: d(hidden) and d(weight) skip tiles of logits without a target and with smaller probabilities only; 0: exact.

    Returns:
        d(hidden) `[R, f]`, d(weight) `[C, f]` and d(bias) `[C]` in the dtypes of hidden, weight and bias; empty where not wanted.
    """
    device = hidden.device
    sums = torch.empty(hidden.shape[0], dtype=torch.float32, device=device)
    sorted_targets = by_row(targets, rows, hidden.shape[0])
    grad = grad.contiguous()
    launch(
        row_sums_kernel, (triton.cdiv(hidden.shape[0], _SUMS.rows),), _SUMS, device, grad=grad, order=sorted_targets.order,
        starts=sorted_targets.starts, sums=sums, count=hidden.shape[0], BLOCK=_SUMS.rows,
    )  # fmt: skip
    known = (grad, sorted_targets, statistics.contiguous(), sums)
    d_hidden, d_weight, d_bias = hidden.new_empty(0), weight.new_empty(0), bias.new_empty(0)
    if need_weight or need_bias:
        d_weight, d_bias = _one_gradient(hidden, weight, bias, *known, True, need_weight, filter_eps, precision)
    if need_hidden:
        d_hidden, _ = _one_gradient(hidden, weight, bias, *known, False, True, filter_eps, precision)
    return d_hidden, d_weight, d_bias


def _one_gradient(
    hidden: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, targets: Targets, statistics: Tensor, sums: Tensor,
    by_labels: bool, product: bool, filter_eps: float, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of weight and bias, or that of the hidden states and nothing."""
    device, labels, channels = hidden.device, weight.shape[0], hidden.shape[1]
    sizes = config("weight" if by_labels else "hidden", device, hidden.dtype, labels)
    own, walked = (weight, hidden) if by_labels else (hidden, weight)
    block_own, block_walk = (sizes.columns, sizes.rows) if by_labels else (sizes.rows, sizes.columns)
    features = min(sizes.features, power_of_two(channels))
    chunks = triton.cdiv(channels, features) if product else 1
    owners = triton.cdiv(own.shape[0], block_own)
    parts, share = split(owners * chunks, triton.cdiv(walked.shape[0], block_walk), device)
    gradient = result(own.shape if product else (0,), own.dtype, device, parts)
    d_bias = result((labels if by_labels else 0,), bias.dtype, device, parts)
    wide_hidden, wide_weight = operand(hidden, hidden.dtype), operand(weight, hidden.dtype)
    launch(
        backward_kernel, (owners, parts, chunks), sizes, device, hidden=wide_hidden, weight=wide_weight, bias=vector(bias),
        grad=grad, targets=targets.targets, order=targets.order, starts=targets.starts, statistics=statistics, sums=sums,
        gradient=gradient, d_bias=d_bias, count=hidden.shape[0], labels=labels, channels=channels, share=share,
        stride_hidden=wide_hidden.stride(0), stride_weight=wide_weight.stride(0), filter_eps=float(filter_eps),
        BY_LABELS=by_labels, PRODUCT=product, FILTER=filter_eps > 0, COMPUTE=operand_dtype(hidden), PRECISION=precision,
        BLOCK_OWN=block_own, BLOCK_WALK=block_walk, DEPTH=sizes.depth, FEATURES=features,
    )  # fmt: skip
    return finished(gradient, own.dtype), finished(d_bias, bias.dtype)
