"""Adam in Triton for a parameter of which few rows have a gradient: repeated rows are summed by the launch that uses them.

A gradient is a list of row numbers, in any order and with repeats, and values `[n, channels]`. The numbers are sorted on the
device, which makes repeats neighbours, in the order of occurrence: a run. The program of a run's first entry owns the row, so
no two programs touch one row, and the host need not know how many rows there are.

All kernels update elements through `moved` and are compiled without contraction: fused multiply-adds are written out. So a
step rounds alike in every kernel, and a step taken late has the same bits as one taken on time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from teracon_fast.kernels.configs import Config
from teracon_fast.kernels.tiles import launch, operand, power_of_two

# There are no products of tiles. `columns`: channels of one row that a program handles at once, or of `rows` rows in a step of
# the whole parameter, where exact division and square root need many registers for each element.
_ROW = Config(rows=16, columns=256, depth=16, warps=8, stages=1)
_ALL = Config(rows=16, columns=128, depth=16, warps=8, stages=1)
# Rows of a run that are loaded at once: a popular item is in every second sequence, and its row has only one program.
_TOGETHER = 16


@triton.jit
def moved(
    parameter, first, second, gradient, step_size, root, coefficient, beta2, rest2, eps, NEAR_OLD: tl.constexpr
):  # fmt: skip
    """Elements and their moments after a step.

    With one rounding an operation, `fma` being one: m = m + (1 - beta1) (g - m) or, for a beta1 up to a half,
    m = g - beta1 (g - m); v = beta2 v + ((1 - beta2) g) g; p = p - step_size m / (sqrt(v) / root + eps).
    """
    difference = gradient - first
    first = tl.fma(difference, coefficient, first if NEAR_OLD else gradient)
    second = tl.fma(gradient * rest2, gradient, second * beta2)
    denominator = tl.div_rn(tl.sqrt_rn(second), tl.zeros_like(second) + root) + eps
    return parameter - tl.div_rn(first * step_size, denominator), first, second


@triton.jit
def loaded(parameter, exp_avg, exp_avg_sq, o, m):
    """Elements and their moments; 0 under a false mask."""
    p = tl.load(parameter + o, mask=m, other=0.0)
    return p, tl.load(exp_avg + o, mask=m, other=0.0), tl.load(exp_avg_sq + o, mask=m, other=0.0)


@triton.jit
def store(parameter, exp_avg, exp_avg_sq, o, m, p, first, second):
    tl.store(parameter + o, p, mask=m)
    tl.store(exp_avg + o, first, mask=m)
    tl.store(exp_avg_sq + o, second, mask=m)


@triton.jit
def replayed(
    parameter, first, second, history, begin, end, coefficient, beta2, rest2, eps, NEAR_OLD: tl.constexpr
):  # fmt: skip
    """Elements and their moments after the steps begin..end-1 of the history, none of which had a gradient for them."""
    for step in range(begin, end):
        step_size, root = tl.load(history + 2 * step), tl.load(history + 2 * step + 1)
        parameter, first, second = moved(
            parameter, first, second, tl.zeros_like(first), step_size, root, coefficient, beta2, rest2, eps, NEAR_OLD
        )
    return parameter, first, second


@triton.jit
def run_sum(
    values, ordered, order, place, row, count, o_channels, m_channels, stride_values, TOGETHER: tl.constexpr
):  # fmt: skip
    """Sum in fp32, in order, of the gradients of `row`, whose run begins at `place`; and where the run ends.

    TOGETHER rows are loaded at once, before it is known whether they belong to the run.
    """
    p_values = values + tl.load(order + place).to(tl.int64) * stride_values + o_channels
    total = tl.load(p_values, mask=m_channels, other=0.0).to(tl.float32)
    end = place + 1
    more = tl.load(ordered + end, mask=end < count, other=-1) == row
    while more:
        found = 0
        for i in tl.static_range(TOGETHER):
            inside = end + i < count
            more = tl.load(ordered + end + i, mask=inside, other=-1) == row
            at = tl.load(order + end + i, mask=inside, other=0).to(tl.int64)
            total += tl.load(values + at * stride_values + o_channels, mask=m_channels & more, other=0.0).to(tl.float32)
            found += more.to(tl.int32)
        end += found
    return total, end


@triton.jit(do_not_specialize=["count", "taken"])
def step_kernel(
    parameter, exp_avg, exp_avg_sq, last, values, ordered, order, history, count, taken, items, channels, stride_values,
    step_size, root, coefficient, beta2, rest2, eps,
    NEAR_OLD: tl.constexpr, TOGETHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Step number `taken`, from 1, of the rows that have a gradient, after the steps that they have missed.

    Its constants are arguments, and are written to the history for rows that take it later.
    """
    place = tl.program_id(0)
    if place == 0:
        tl.store(history + 2 * (taken - 1), step_size)
        tl.store(history + 2 * (taken - 1) + 1, root)
    row = tl.load(ordered + place, mask=place < count, other=-1)
    before = tl.load(ordered + place - 1, mask=(place > 0) & (place < count), other=-1)
    if (row >= 0) & (row < items) & (row != before):
        done = tl.load(last + row)
        begin = tl.where(done < 0, taken - 1, done)
        for piece in range(tl.cdiv(channels, BLOCK)):
            o_channels = piece * BLOCK + tl.arange(0, BLOCK)
            m_channels = o_channels < channels
            gradient, _ = run_sum(
                values, ordered, order, place, row, count, o_channels, m_channels, stride_values, TOGETHER
            )
            o_elements = row.to(tl.int64) * channels + o_channels
            p, m, v = loaded(parameter, exp_avg, exp_avg_sq, o_elements, m_channels)
            p, m, v = replayed(p, m, v, history, begin, taken - 1, coefficient, beta2, rest2, eps, NEAR_OLD)
            p, m, v = moved(p, m, v, gradient, step_size, root, coefficient, beta2, rest2, eps, NEAR_OLD)
            store(parameter, exp_avg, exp_avg_sq, o_elements, m_channels, p, m, v)
        # All threads have read it.
        tl.debug_barrier()
        tl.store(last + row, taken)


@triton.jit(do_not_specialize=["count", "taken"])
def catch_up_kernel(
    parameter, exp_avg, exp_avg_sq, last, ordered, history, count, taken, items, channels, coefficient, beta2, rest2, eps,
    ALL: tl.constexpr, NEAR_OLD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Brings rows to the end of `taken` steps: all `count` of them, or those at the `count` places of `ordered`."""
    place = tl.program_id(0)
    if ALL:
        row, wanted = place, place < items
    else:
        row = tl.load(ordered + place)
        before = tl.load(ordered + place - 1, mask=place > 0, other=-1)
        wanted = (row >= 0) & (row < items) & (row != before)
    done = tl.load(last + row, mask=wanted, other=-1)
    if (done >= 0) & (done < taken):
        for piece in range(tl.cdiv(channels, BLOCK)):
            o_channels = piece * BLOCK + tl.arange(0, BLOCK)
            m_channels = o_channels < channels
            o_elements = row.to(tl.int64) * channels + o_channels
            p, m, v = loaded(parameter, exp_avg, exp_avg_sq, o_elements, m_channels)
            p, m, v = replayed(p, m, v, history, done, taken, coefficient, beta2, rest2, eps, NEAR_OLD)
            store(parameter, exp_avg, exp_avg_sq, o_elements, m_channels, p, m, v)
        # All threads have read it.
        tl.debug_barrier()
        tl.store(last + row, taken)


@triton.jit(do_not_specialize=["count"])
def whole_step_kernel(
    parameter, exp_avg, exp_avg_sq, values, ordered, order, count, items, channels, stride_values,
    step_size, root, coefficient, beta2, rest2, eps,
    NEAR_OLD: tl.constexpr, TOGETHER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A step of all rows: first those of the tile without gradient, together, then the others one by one.

    Rows with a gradient are found in `ordered` by binary search: 4 bytes per entry, cached for all programs. A map from rows
    to entries would have to be written and read for every row, and is no faster than 20 halvings for a whole tile at once.
    """
    o_rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_rows = o_rows < items
    o_channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_channels = o_channels < channels
    # The first place that is not below a row.
    low = tl.zeros([ROWS], tl.int32)
    high, span = low + count, count
    while span > 0:
        middle = low + (high - low) // 2
        searching = low < high
        below = searching & (tl.load(ordered + middle, mask=searching, other=0) < o_rows)
        low = tl.where(below, middle + 1, low)
        high = tl.where(searching & (below == 0), middle, high)
        span = span // 2
    has_gradient = tl.load(ordered + low, mask=low < count, other=-1) == o_rows
    o_elements = o_rows.to(tl.int64)[:, None] * channels + o_channels[None, :]
    m_elements = (m_rows & (has_gradient == 0))[:, None] & m_channels[None, :]
    p, m, v = loaded(parameter, exp_avg, exp_avg_sq, o_elements, m_elements)
    p, m, v = moved(p, m, v, tl.zeros_like(m), step_size, root, coefficient, beta2, rest2, eps, NEAR_OLD)
    store(parameter, exp_avg, exp_avg_sq, o_elements, m_elements, p, m, v)

    place = tl.min(low, 0)
    end = tl.minimum((tl.program_id(0) + 1) * ROWS, items)
    row = tl.load(ordered + place, mask=place < count, other=items)
    while row < end:
        gradient, place = run_sum(
            values, ordered, order, place, row, count, o_channels, m_channels, stride_values, TOGETHER
        )
        o_own = row.to(tl.int64) * channels + o_channels
        own_p, own_m, own_v = loaded(parameter, exp_avg, exp_avg_sq, o_own, m_channels)
        own_p, own_m, own_v = moved(
            own_p, own_m, own_v, gradient, step_size, root, coefficient, beta2, rest2, eps, NEAR_OLD
        )
        store(parameter, exp_avg, exp_avg_sq, o_own, m_channels, own_p, own_m, own_v)
        row = tl.load(ordered + place, mask=place < count, other=items)


def step(
    parameter: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, last: Tensor, rows: Tensor, values: Tensor, history: Tensor,
    taken: int, step_size: float, root: float, beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    """A step of the rows that have a gradient, after the steps that they have missed. Never waits for the device.

    Args:
        parameter, exp_avg, exp_avg_sq: float32 `[V, ...]`, contiguous, changed in place. V below 2^31.
        last: int32 `[V]`, steps of the history that each row has taken, changed in place; -1: its moments are zero, so that no
            step without gradient changes it.
        rows: int64 `[n]`, in any order and repeated; those out of range are skipped.
        values: `[n, ...]`, floating, of any layout. Repeats are summed in the order given, in float32.
        history: float32 `[N, 2]`, contiguous; step_size and root of each step, written here for this one.
        taken: number of this step, from 1 to N.
        step_size, root: lr / (1 - beta1^t) and sqrt(1 - beta2^t) of step t, known without the device.
        beta1, beta2, eps: of Adam.
    """
    ordered, order = _sorted(rows)
    count = rows.shape[0]
    launch(
        step_kernel, (max(count, 1),), _ROW, parameter.device, **_elements(parameter, exp_avg, exp_avg_sq), last=last,
        **_matrix(values), ordered=ordered, order=order, history=history, count=count, taken=taken, step_size=float(step_size),
        root=float(root), **_constants(beta1, beta2, eps), TOGETHER=_TOGETHER, BLOCK=_block(parameter, _ROW),
    )  # fmt: skip


def catch_up(
    parameter: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, last: Tensor, items: Tensor | None, history: Tensor, taken: int,
    beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    """Bring the rows `items`, int64 or int32 `[n]`, or all rows to the end of `taken` steps. Other arguments as `step`."""
    # Without items the kernel does not read `ordered`.
    ordered = last if items is None else _sorted(items)[0]
    count = ordered.shape[0]
    launch(
        catch_up_kernel, (count,), _ROW, parameter.device, **_elements(parameter, exp_avg, exp_avg_sq), last=last,
        ordered=ordered, history=history, count=count, taken=taken, **_constants(beta1, beta2, eps), ALL=items is None,
        BLOCK=_block(parameter, _ROW),
    )  # fmt: skip


def whole_step(
    parameter: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, rows: Tensor, values: Tensor, step_size: float, root: float,
    beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    """A step of all rows, in one pass over the parameter and its moments. Arguments as `step`."""
    ordered, order = _sorted(rows)
    block, elements = _block(parameter, _ALL), _elements(parameter, exp_avg, exp_avg_sq)
    launch(
        whole_step_kernel, (triton.cdiv(elements["items"], _ALL.rows), triton.cdiv(elements["channels"], block)), _ALL,
        parameter.device, **elements, **_matrix(values), ordered=ordered, order=order, count=rows.shape[0],
        step_size=float(step_size), root=float(root), **_constants(beta1, beta2, eps), TOGETHER=_TOGETHER, ROWS=_ALL.rows,
        BLOCK=block,
    )  # fmt: skip


def _sorted(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers in ascending order, int32, which sort in half the passes of int64, and the place of each before, int64."""
    # Truncated instead, a number out of range could look like a row.
    narrow = rows.clamp(-1, torch.iinfo(torch.int32).max).to(torch.int32)
    ordered, order = narrow.sort(stable=True)
    return ordered, order


def _matrix(values: Tensor) -> dict[str, Any]:
    """`values` as `[n, channels]` with contiguous rows, and the stride between rows."""
    matrix = operand(values.flatten(1) if values.dim() > 1 else values[:, None], values.dtype)
    # The stride of a single row is arbitrary, and kernels are specialised on it.
    return {"values": matrix, "stride_values": matrix.stride(0) if len(matrix) > 1 else matrix.shape[1]}


def _elements(parameter: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> dict[str, Any]:
    rows = parameter.shape[0]
    arrays = {"parameter": parameter.detach(), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    return {**arrays, "items": rows, "channels": parameter.numel() // max(rows, 1)}


def _constants(beta1: float, beta2: float, eps: float) -> dict[str, Any]:
    near_old = 1 - beta1 < 0.5
    return {
        "coefficient": 1 - beta1 if near_old else -beta1, "beta2": float(beta2), "rest2": 1 - beta2, "eps": float(eps),
        "NEAR_OLD": near_old, "enable_fp_fusion": False,
    }  # fmt: skip


def _block(parameter: Tensor, sizes: Config) -> int:
    """Channels that a program handles at once."""
    return min(sizes.columns, power_of_two(parameter.numel() // max(parameter.shape[0], 1)))
