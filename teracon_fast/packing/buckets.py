"""Packed tables in a few fixed sizes, so that a step recorded for one batch (a CUDA graph) serves others of its bucket.

Rows, bags and members of bags are added that nothing reads: results and gradients stay as they were, but for zeros added.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from teracon_fast.errors import ShapeError
from teracon_fast.packing.types import PackedBatch, ResidualTable, TapTable

STEP, RATIO = 256, 1.25


def _series() -> list[int]:
    found = [0, STEP]
    while found[-1] * RATIO < 2**31:
        found.append(-(-int(found[-1] * RATIO) // STEP) * STEP)
    return found


# 0, and multiples of STEP, each the first from RATIO times the one before on.
_SERIES = _series()


@dataclass(frozen=True)
class Sizes:
    """Sizes of all tables of a packed batch. Hashable: batches whose tables have equal shapes have equal sizes.

    Attributes:
        rows: of every layer, the embedding first.
        bags, members: number of bags and of their members, of every convolution.
        outputs: shape of the rows of every request's outputs.
    """

    rows: tuple[int, ...]
    bags: tuple[int, ...]
    members: tuple[int, ...]
    outputs: tuple[tuple[int, ...], ...]


def sizes(packed: PackedBatch) -> Sizes:
    """The sizes that a batch has."""
    tables = packed.convolutions
    return Sizes(
        (packed.cells.shape[0], *(table.taps.shape[0] for table in tables)),
        tuple(table.bag_offsets.shape[0] - 1 for table in tables),
        tuple(table.bag_rows.shape[0] for table in tables),
        tuple(tuple(rows.shape) for rows in packed.outputs),
    )


def bucket(real: Sizes) -> Sizes:
    """The sizes to pad a batch to: the key of its bucket. Nothing stays nothing; outputs keep their shapes.

    Where there are bags, at least one is added: PyTorch counts members after the last bag to it.

    Raises:
        ShapeError: for 2^31 rows and more.
    """
    return Sizes(
        tuple(map(rounded, real.rows)), tuple(map(rounded_bags, real.bags)), tuple(map(rounded, real.members)), real.outputs
    )  # fmt: skip


def rounded(count: int) -> int:
    """The bucket of a number of rows or members, see `bucket`."""
    found = _SERIES[min(bisect_left(_SERIES, count), len(_SERIES) - 1)]
    if not count <= found < 2**31:
        raise ShapeError(f"packed batch has {count} rows, too many to pad to less than 2**31: encode fewer users at once")
    return found


def rounded_bags(count: int) -> int:
    """The bucket of a number of bags, see `bucket`."""
    return rounded(count + 1) if count else 0


def padded_rows(rows_per_request: Sequence[int], rows: int) -> tuple[int, ...]:
    """Rows of each request when padding belongs to the last one."""
    return (*rows_per_request[:-1], rows_per_request[-1] + rows - sum(rows_per_request)) if rows_per_request else ()


def pad(packed: PackedBatch, wanted: Sizes | None = None) -> PackedBatch:
    """The same batch in tables of other sizes, on the same device, without waiting for it.

    Added rows read nothing (taps -1), are read by nothing (readers -1), are of cell 0, add row 0 of a block's input, and belong
    to the last request in `rows_per_request`; `row_ends` does not change. Added bags are empty.

    Args:
        packed: any batch.
        wanted: None for the batch's bucket.

    Raises:
        ShapeError: for sizes below the batch's own, members without a bag of their own, or rows for a batch that has none.
    """
    real = sizes(packed)
    wanted = bucket(real) if wanted is None else wanted
    _check(real, wanted)
    cells = _extended(packed.cells, wanted.rows[0], 0)
    built: dict[tuple[int, ...], TapTable] = {}
    convolutions = []
    for i, table in enumerate(packed.convolutions):
        sized = (wanted.rows[i], wanted.rows[i + 1], wanted.bags[i], wanted.members[i])
        if (id(table), *sized) not in built:
            built[id(table), *sized] = _padded_table(table, *sized)
        convolutions.append(built[id(table), *sized])
    residuals: list[ResidualTable] = [
        table._replace(
            rows=_extended(table.rows, wanted.rows[2 * i + 2], 0), readers=_extended(table.readers, wanted.rows[2 * i], -1)
        )
        for i, table in enumerate(packed.residuals)
    ]
    return replace(packed, cells=cells, convolutions=convolutions, residuals=residuals)


def _check(real: Sizes, wanted: Sizes) -> None:
    pairs = [(getattr(real, name), getattr(wanted, name)) for name in ("rows", "bags", "members")]
    fits = all(len(r) == len(w) and all(a <= b for a, b in zip(r, w, strict=True)) for r, w in pairs)
    if not fits or real.outputs != wanted.outputs or max(wanted.rows) >= 2**31:
        raise ShapeError(f"cannot pad to {wanted}, expected at least {real}, less than 2**31 rows, and the same outputs")
    if not all(real.rows) and real.rows != wanted.rows:
        raise ShapeError(f"cannot pad a batch without users to rows {wanted.rows}, expected {real.rows}")
    for bags, members, more_bags, more_members in zip(real.bags, real.members, wanted.bags, wanted.members, strict=True):
        if more_members > members and more_bags == bags:
            raise ShapeError(f"cannot pad {members} members of {bags} bags to {more_members}, expected more bags too")


def _padded_table(table: TapTable, rows_in: int, rows_out: int, bags: int, members: int) -> TapTable:
    rows = table.taps.shape[0]
    # Bags are numbered from the number of output rows on.
    readers = torch.where(table.readers >= rows, table.readers + (rows_out - rows), table.readers)
    return replace(
        table,
        taps=_extended(table.taps, rows_out, -1),
        readers=_extended(readers, rows_in, -1),
        bag_rows=_extended(table.bag_rows, members, 0),
        bag_offsets=torch.cat([table.bag_offsets, table.bag_offsets[-1:].expand(bags + 1 - table.bag_offsets.shape[0])]),
        rows_per_request=padded_rows(table.rows_per_request, rows_out),
        rows_in=rows_in,
    )


def _extended(table: Tensor, rows: int, value: int) -> Tensor:
    added = table.new_full((rows - table.shape[0], *table.shape[1:]), value)
    return torch.cat([table, added])
