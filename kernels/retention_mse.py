"""Squared distance between the student's and the teacher's logits in Triton: logits exist in registers only.

One walk over both heads' weights gives the distance and all gradients: a program owns a share of the labels, computes tiles of
differences, sums their squares, and multiplies them by the student's hidden states for d(weight) and by the student's weights
for its part of d(hidden). The parts of d(hidden) are then added in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from teracon_fast.kernels.configs import config, split
from teracon_fast.kernels.tiles import (
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

# Channels of d(weight) computed at once.
_PIECE = 64


@triton.jit(do_not_specialize=["count", "share"])
def retention_kernel(
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, d_hidden, d_weight, d_bias, squares,
    coefficient, valid, count, labels, channels, share, stride_hidden, stride_weight, stride_teacher_hidden,
    stride_teacher_weight, GRADIENTS: tl.constexpr, PADDED: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_LABELS: tl.constexpr, DEPTH: tl.constexpr, FEATURES: tl.constexpr,
    PIECE: tl.constexpr,
):  # fmt: skip
    """`squares` `[shares, BLOCK_LABELS]`, `d_hidden` `[shares, n, f]`, d(weight) and d(bias) of the share's labels."""
    part = tl.program_id(0)
    twice = 2 * tl.load(coefficient)
    real = tl.load(valid) if PADDED else count
    o_features = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    m_features = o_features < channels
    square = tl.zeros([BLOCK_LABELS], tl.float32)
    last = tl.minimum((part + 1) * share, tl.cdiv(labels, BLOCK_LABELS))
    for row_tile in range(tl.cdiv(count, BLOCK_ROWS)):
        o_rows = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        m_rows = o_rows < real
        if GRADIENTS:
            hidden_sum = tl.zeros([BLOCK_ROWS, FEATURES], tl.float32)
        for tile in range(part * share, last):
            o_labels = tile * BLOCK_LABELS + tl.arange(0, BLOCK_LABELS)
            m_labels = o_labels < labels
            # Two sums, not one: equal students and teachers must differ by exactly 0.
            difference = product_tile(
                hidden, weight, o_rows, o_labels, m_rows, m_labels, channels, stride_hidden, stride_weight,
                COMPUTE, PRECISION, BLOCK_ROWS, BLOCK_LABELS, DEPTH,
            )  # fmt: skip
            difference += tl.load(bias + o_labels, mask=m_labels, other=0.0).to(tl.float32)[None, :]
            teacher = product_tile(
                teacher_hidden, teacher_weight, o_rows, o_labels, m_rows, m_labels, channels, stride_teacher_hidden,
                stride_teacher_weight, COMPUTE, PRECISION, BLOCK_ROWS, BLOCK_LABELS, DEPTH,
            )  # fmt: skip
            teacher += tl.load(teacher_bias + o_labels, mask=m_labels, other=0.0).to(tl.float32)[None, :]
            difference = tl.where(m_rows[:, None] & m_labels[None, :], difference - teacher, 0.0)
            square += tl.sum(difference * difference, 0)
            if GRADIENTS:
                low = difference.to(COMPUTE)
                values = feature_tile(weight, o_labels, m_labels, o_features, channels, stride_weight, COMPUTE)
                hidden_sum = tl.dot(low, values, hidden_sum, input_precision=PRECISION)
                m_bias = m_labels & (tl.program_id(1) == 0)
                bias_sum = tl.sum(difference, 0) * twice
                if row_tile > 0:
                    bias_sum += tl.load(d_bias + o_labels, mask=m_bias, other=0.0).to(tl.float32)
                tl.store(d_bias + o_labels, bias_sum, mask=m_bias)
                # In pieces: the sums of d(hidden) take most of the registers.
                for piece in tl.static_range(FEATURES // PIECE):
                    o_piece = tl.program_id(1) * FEATURES + piece * PIECE + tl.arange(0, PIECE)
                    rows = feature_tile(hidden, o_rows, m_rows, o_piece, channels, stride_hidden, COMPUTE)
                    product = tl.dot(tl.trans(low), rows, input_precision=PRECISION) * twice
                    p_weight = d_weight + o_labels.to(tl.int64)[:, None] * channels + o_piece[None, :]
                    m_weight = m_labels[:, None] & (o_piece < channels)[None, :]
                    if row_tile > 0:
                        product += tl.load(p_weight, mask=m_weight, other=0.0).to(tl.float32)
                    tl.store(p_weight, product, mask=m_weight)
        if GRADIENTS:
            p_hidden = d_hidden + (part.to(tl.int64) * count + o_rows)[:, None] * channels + o_features[None, :]
            tl.store(p_hidden, hidden_sum * twice, mask=(o_rows < count)[:, None] & m_features[None, :])
            # Another thread may read it for the next rows.
            tl.debug_barrier()
    if tl.program_id(1) == 0:
        tl.store(squares + part * BLOCK_LABELS + tl.arange(0, BLOCK_LABELS), square)


def forward_backward(
    student_hidden: Tensor, weight: Tensor, bias: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, teacher_bias: Tensor,
    coefficient: Tensor, need_grad: bool, valid: Tensor | None = None, precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`coefficient * sum((student logits - teacher logits)^2)` and its gradients with respect to the student's tensors.

    Equal students and teachers give exactly 0. Results have the same bits in every run.

    Args:
        student_hidden, teacher_hidden: `[n, f]`, float32, bfloat16 or float16.
        weight, teacher_weight: `[C, f]`, of that dtype or float32, C below 2^31. bias, teacher_bias: `[C]`.
        coefficient: a scalar on the device. valid: int32 scalar on the device, rows from there on are padding.
        precision: of products of float32: "ieee" or "tf32".

    Returns:
        The loss, a float32 scalar; gradients in the dtypes of the student's tensors, empty without `need_grad`.
    """
    device, dtype = student_hidden.device, student_hidden.dtype
    coefficient = coefficient.float()
    (count, channels), labels = student_hidden.shape, weight.shape[0]
    sizes = config("retention", device, dtype, labels)
    features = min(sizes.features, power_of_two(channels))
    chunks = triton.cdiv(channels, features) if need_grad else 1
    parts, share = split(chunks, triton.cdiv(labels, sizes.columns), device)
    # Several tiles of rows add to d(weight) in turn, without rounding in between.
    once = count <= sizes.rows

    def gradient(shape: tuple[int, ...], like: Tensor) -> Tensor:
        return result(shape if need_grad else (0,), like.dtype if once else torch.float32, device)

    d_hidden = result((count, channels) if need_grad else (0,), dtype, device, parts)
    d_weight, d_bias = gradient((labels, channels), weight), gradient((labels,), bias)
    squares = torch.empty((parts, sizes.columns), dtype=torch.float32, device=device)
    wide_hidden, wide_teacher_hidden = operand(student_hidden, dtype), operand(teacher_hidden, dtype)
    wide_weight, wide_teacher_weight = operand(weight, dtype), operand(teacher_weight, dtype)
    launch(
        retention_kernel, (parts, chunks), sizes, device, hidden=wide_hidden, weight=wide_weight, bias=vector(bias),
        teacher_hidden=wide_teacher_hidden, teacher_weight=wide_teacher_weight, teacher_bias=vector(teacher_bias),
        d_hidden=d_hidden, d_weight=d_weight, d_bias=d_bias, squares=squares, count=count, labels=labels, channels=channels,
        share=share, stride_hidden=wide_hidden.stride(0), stride_weight=wide_weight.stride(0),
        stride_teacher_hidden=wide_teacher_hidden.stride(0), stride_teacher_weight=wide_teacher_weight.stride(0),
        coefficient=coefficient, valid=coefficient if valid is None else valid, GRADIENTS=need_grad, PADDED=valid is not None,
        COMPUTE=operand_dtype(student_hidden), PRECISION=precision,
        BLOCK_ROWS=sizes.rows, BLOCK_LABELS=sizes.columns, DEPTH=sizes.depth, FEATURES=features,
        PIECE=min(features, _PIECE),
    )  # fmt: skip
    loss = squares.sum() * coefficient
    return loss, finished(d_hidden, dtype), finished(d_weight, weight.dtype), finished(d_bias, bias.dtype)
