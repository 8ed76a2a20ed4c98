"""One walk over all labels' logits: each row's maximum, sum of exponentials and best label, each target's rank.

A program owns a tile of rows and walks over a share of the labels, holding one tile of logits at a time; shares are then
merged in order. Neighbouring programs read the same labels at the same time, so the weights come from memory about once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from teracon_fast.kernels.configs import Config, config, split
from teracon_fast.kernels.tiles import LOWEST, Targets, by_row, launch, operand, operand_dtype, product_tile, vector

_MERGE = Config(rows=128, columns=1, depth=1, warps=4, stages=1)


@triton.jit(do_not_specialize=["count"])
def own_logits_kernel(
    hidden, weight, bias, targets, rows, own, count, channels, stride_hidden, stride_weight,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_LABELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The logit of each target: the diagonal of a tile of their rows and labels.

    A tile of the size that the scan uses, so that a target and another label with equal weights have equal bits.
    """
    TAKEN: tl.constexpr = min(BLOCK_ROWS, BLOCK_LABELS)
    first = tl.program_id(0).to(tl.int64) * TAKEN
    o_down, o_across = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_LABELS)
    m_down = (o_down < TAKEN) & (first + o_down < count)
    m_across = (o_across < TAKEN) & (first + o_across < count)
    o_rows = tl.load(rows + first + o_down, mask=m_down, other=0)
    o_labels = tl.load(targets + first + o_across, mask=m_across, other=0)
    logits = product_tile(
        hidden, weight, o_rows, o_labels, m_down, m_across, channels, stride_hidden, stride_weight,
        COMPUTE, PRECISION, BLOCK_ROWS, BLOCK_LABELS, DEPTH,
    )  # fmt: skip
    logits += tl.load(bias + o_labels, mask=m_across, other=0.0).to(tl.float32)[None, :]
    diagonal = tl.sum(tl.where(o_down[:, None] == o_across[None, :], logits, 0.0), 1)
    tl.store(own + first + o_down, diagonal, mask=m_down)


@triton.jit
def _ahead(logits, o_labels, mine, target):
    """How many labels of the tile rank before each row's target, which itself never does."""
    others = o_labels[None, :] != target[:, None]
    before = (logits > mine[:, None]) | ((logits == mine[:, None]) & (o_labels[None, :] < target[:, None]))
    return tl.sum((before & others).to(tl.int32), 1)


@triton.jit(do_not_specialize=["count", "targets_count", "share"])
def scan_kernel(
    hidden, weight, bias, own, targets, order, starts, maxima, totals, bests, broken, ahead,
    count, labels, channels, targets_count, share, stride_hidden, stride_weight,
    STATISTICS: tl.constexpr, RANKS: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_LABELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Statistics of one tile of rows over one share of the labels: `[shares, R]` each, `ahead` `[shares, N]`."""
    part = tl.program_id(1)
    o_rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m_rows = o_rows < count
    if STATISTICS:
        maximum = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_ROWS], tl.float32)
        best = tl.zeros([BLOCK_ROWS], tl.int32)
    if RANKS:
        not_numbers = tl.zeros([BLOCK_ROWS], tl.int32)
        p_ahead = ahead + part.to(tl.int64) * targets_count
        start = tl.load(starts + o_rows, mask=m_rows, other=0)
        end = tl.load(starts + o_rows + 1, mask=m_rows, other=0)
        most = tl.max(end - start)
        # A row's first target, mostly its only one, is counted in registers, others in memory.
        number = tl.load(order + start, mask=start < end, other=0)
        mine = tl.load(own + number, mask=start < end, other=0.0)
        target = tl.load(targets + number, mask=start < end, other=0).to(tl.int32)
        before = tl.zeros([BLOCK_ROWS], tl.int32)
        for turn in range(1, most):
            m_turn = start + turn < end
            number_turn = tl.load(order + start + turn, mask=m_turn, other=0)
            tl.store(p_ahead + number_turn, tl.zeros([BLOCK_ROWS], tl.int32), mask=m_turn)
        tl.debug_barrier()
    for tile in range(part * share, tl.minimum((part + 1) * share, tl.cdiv(labels, BLOCK_LABELS))):
        o_labels = tile * BLOCK_LABELS + tl.arange(0, BLOCK_LABELS)
        m_labels = o_labels < labels
        logits = product_tile(
            hidden, weight, o_rows, o_labels, m_rows, m_labels, channels, stride_hidden, stride_weight,
            COMPUTE, PRECISION, BLOCK_ROWS, BLOCK_LABELS, DEPTH,
        )  # fmt: skip
        logits += tl.load(bias + o_labels, mask=m_labels, other=0.0).to(tl.float32)[None, :]
        logits = tl.where(m_labels[None, :], logits, float("-inf"))
        if STATISTICS:
            highest = tl.max(logits, 1)
            larger = tl.maximum(maximum, highest)
            if RANKS:
                first = tl.min(tl.where(logits == highest[:, None], o_labels[None, :], labels), 1)
                best = tl.where(highest > maximum, first, best)
            total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(logits - larger[:, None]), 1)
            maximum = larger
        if RANKS:
            not_numbers += tl.sum((logits != logits).to(tl.int32), 1)
            before += _ahead(logits, o_labels, mine, target)
            for turn in range(1, most):
                m_turn = start + turn < end
                number_turn = tl.load(order + start + turn, mask=m_turn, other=0)
                mine_turn = tl.load(own + number_turn, mask=m_turn, other=0.0)
                target_turn = tl.load(targets + number_turn, mask=m_turn, other=0).to(tl.int32)
                sum_turn = tl.load(p_ahead + number_turn, mask=m_turn, other=0)
                sum_turn += _ahead(logits, o_labels, mine_turn, target_turn)
                # Another thread may read it in the next tile.
                tl.debug_barrier()
                tl.store(p_ahead + number_turn, sum_turn, mask=m_turn)
                tl.debug_barrier()
    o_part = part.to(tl.int64) * count + o_rows
    if STATISTICS:
        tl.store(maxima + o_part, maximum, mask=m_rows)
        tl.store(totals + o_part, total, mask=m_rows)
    if RANKS:
        if STATISTICS:
            tl.store(bests + o_part, best, mask=m_rows)
        tl.store(broken + o_part, not_numbers, mask=m_rows)
        tl.store(p_ahead + number, before, mask=start < end)


@triton.jit(do_not_specialize=["count", "parts"])
def merge_rows_kernel(maxima, totals, bests, statistics, argmax, count, parts, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    """Maximum and sum of each row from those of its shares, in order; of equally good best labels the first."""
    o_rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_rows = o_rows < count
    maximum = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    best = tl.zeros([BLOCK], tl.int64)
    o_part = o_rows
    for _ in range(parts):
        highest = tl.load(maxima + o_part, mask=m_rows, other=0.0)
        larger = tl.maximum(maximum, highest)
        total = total * tl.exp(maximum - larger) + tl.load(totals + o_part, mask=m_rows, other=0.0) * tl.exp(highest - larger)
        if RANKS:
            best = tl.where(highest > maximum, tl.load(bests + o_part, mask=m_rows, other=0).to(tl.int64), best)
        maximum = larger
        o_part += count
    tl.store(statistics + o_rows, maximum, mask=m_rows)
    tl.store(statistics + count + o_rows, total, mask=m_rows)
    if RANKS:
        tl.store(argmax + o_rows, best, mask=m_rows)


@triton.jit(do_not_specialize=["count", "rows_count", "parts"])
def merge_targets_kernel(
    own, rows, statistics, broken, ahead, losses, ranks, count, rows_count, labels, parts,
    STATISTICS: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss and rank of each target from its row's statistics and its shares' counts."""
    o_targets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_targets = o_targets < count
    row = tl.load(rows + o_targets, mask=m_targets, other=0)
    if STATISTICS:
        mine = tl.load(own + o_targets, mask=m_targets, other=0.0)
        maximum = tl.load(statistics + row, mask=m_targets, other=0.0)
        total = tl.load(statistics + rows_count + row, mask=m_targets, other=1.0)
        # Differences first: the loss of a certain label is far below its logit.
        tl.store(losses + o_targets, (maximum - mine) + tl.log(total), mask=m_targets)
    if RANKS:
        rank = tl.zeros([BLOCK], tl.int64)
        not_numbers = tl.zeros([BLOCK], tl.int32)
        o_ahead = o_targets
        for _ in range(parts):
            rank += tl.load(ahead + o_ahead, mask=m_targets, other=0)
            not_numbers += tl.load(broken + row, mask=m_targets, other=0)
            o_ahead += count
            row += rows_count
        tl.store(ranks + o_targets, tl.where(not_numbers > 0, labels, rank), mask=m_targets)


def scan(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, rows: Tensor, statistics: bool, ranks: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses `[N]`, statistics `[2, R]`, best labels `[R]` and ranks `[N]`: see `linear_cross_entropy.forward`.

    The first two are empty without `statistics`, the last without `ranks`, best labels without both.
    """
    device, dtype = hidden.device, hidden.dtype
    count, labels, number = hidden.shape[0], weight.shape[0], targets.shape[0]
    sizes = config("scan", device, dtype, labels)
    parts, share = split(triton.cdiv(count, sizes.rows), triton.cdiv(labels, sizes.columns), device)
    targets, rows = targets.contiguous(), rows.contiguous()
    # Losses alone need no order; the placeholders are not read.
    by_rows = by_row(targets, rows, count) if ranks else Targets(targets, rows, order=targets, starts=targets)

    def empty(needed: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape if needed else 0, dtype=dtype, device=device)

    own = empty(True, number)
    losses, pair = empty(statistics, number), empty(statistics, 2, count)
    argmax, rank = empty(statistics and ranks, count, dtype=torch.int64), empty(ranks, number, dtype=torch.int64)
    maxima, totals = empty(statistics, parts, count), empty(statistics, parts, count)
    bests, broken = (empty(ranks, parts, count, dtype=torch.int32) for _ in range(2))
    ahead = empty(ranks, parts, number, dtype=torch.int32)

    operands = {"hidden": operand(hidden, dtype), "weight": operand(weight, dtype), "bias": vector(bias)}
    strides = {"stride_hidden": operands["hidden"].stride(0), "stride_weight": operands["weight"].stride(0)}
    tile = {
        "COMPUTE": operand_dtype(hidden), "PRECISION": precision,
        "BLOCK_ROWS": sizes.rows, "BLOCK_LABELS": sizes.columns, "DEPTH": sizes.depth,
    }  # fmt: skip
    launch(
        own_logits_kernel, (triton.cdiv(number, min(sizes.rows, sizes.columns)),), sizes, device, **operands, targets=targets,
        rows=rows, own=own, count=number, channels=hidden.shape[1], **strides, **tile,
    )  # fmt: skip
    launch(
        scan_kernel, (triton.cdiv(count, sizes.rows), parts), sizes, device, **operands, own=own, targets=targets,
        order=by_rows.order, starts=by_rows.starts, maxima=maxima, totals=totals, bests=bests, broken=broken,
        ahead=ahead, count=count, labels=labels, channels=hidden.shape[1], targets_count=number, share=share, **strides,
        STATISTICS=statistics, RANKS=ranks, **tile,
    )  # fmt: skip
    if statistics:
        launch(
            merge_rows_kernel, (triton.cdiv(count, _MERGE.rows),), _MERGE, device, maxima=maxima, totals=totals, bests=bests,
            statistics=pair, argmax=argmax, count=count, parts=parts, RANKS=ranks, BLOCK=_MERGE.rows,
        )  # fmt: skip
    launch(
        merge_targets_kernel, (triton.cdiv(number, _MERGE.rows),), _MERGE, device, own=own, rows=rows, statistics=pair,
        broken=broken, ahead=ahead, losses=losses, ranks=rank, count=number, rows_count=count, labels=labels, parts=parts,
        STATISTICS=statistics, RANKS=ranks, BLOCK=_MERGE.rows,
    )  # fmt: skip
    return losses, pair, argmax, rank
