"""What readers yield and the writer consumes: consecutive rows of a task, with raw ids and their source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from teracon_fast.errors import DataError

RawIds: TypeAlias = npt.NDArray[Any]
"""Raw ids: an array of an integer dtype, or of strings (`dtype=object` or `<U`). 0 or "0" is the pad."""

Rows: TypeAlias = "npt.NDArray[Any] | Block"
LabelArrays: TypeAlias = tuple[npt.NDArray[Any], RawIds]


@dataclass
class Block:
    """Consecutive rows of one task.

    Attributes:
        items: [n, L] raw item ids, oldest first, left-padded with 0 (or "0").
        label_rows: [m] integers, the row of this block of each label; None if the source has no labels.
        label_values: [m] raw labels, integers or strings.
        groups: [n] int64 user ids for the split by user; None: each row is its own user.
        path, first_line: source of the rows, for error messages: row r of the block is line (CSV, from 1) or row (Parquet, from
            0) `first_line + r` of `path`.
    """

    items: RawIds
    label_rows: npt.NDArray[Any] | None = None
    label_values: RawIds | None = None
    groups: npt.NDArray[Any] | None = None
    path: Path | None = None
    first_line: int = 0

    def error(self, row: int, reason: str) -> DataError:
        """The error to raise for row `row` of this block."""
        return DataError(self.path or "sequences", reason, self.first_line + row)


def checked_source(path: str | Path, length: int | None, empty_labels: str) -> Path:
    """The file of a reader, whose options are checked; DataError if one is wrong or there is no such file."""
    path = Path(path)
    if empty_labels not in ("error", "skip"):
        raise DataError(path, f"empty labels: got {empty_labels!r}; expected 'error' or 'skip'")
    if length is not None and length < 1:
        raise DataError(path, f"got length {length}; expected at least 1")
    if not path.is_file():
        raise DataError(path, "no such file")
    return path


def pad_left(values: RawIds, offsets: npt.NDArray[Any], length: int, pad: Any = 0) -> RawIds:
    """Ragged sequences as a left-padded array; sequences longer than `length` keep their newest (last) items.

    Args:
        values: 1-D, the concatenated sequences.
        offsets: integers, [n+1]: sequence r is `values[offsets[r]:offsets[r+1]]`; or [2, n]: sequence r is
            `values[offsets[0, r]:offsets[1, r]]`.
        length: L.
        pad: 0, or "0" if `values` are strings.

    Returns:
        [n, L] array of the dtype of `values`.
    """
    bounds = offsets if offsets.ndim == 2 else np.stack([offsets[:-1], offsets[1:]])
    starts, ends = bounds.astype(np.int64)[:, :, None]
    source = ends - length + np.arange(length)
    real = source >= starts
    if not len(values):
        return np.full(source.shape, pad, dtype=values.dtype)
    return np.where(real, values[np.where(real, source, 0)], np.asarray(pad, dtype=values.dtype))


def as_blocks(
    sequences: npt.NDArray[Any] | Iterable[Rows],
    labels: RawIds | LabelArrays | None = None,
    groups: npt.NDArray[Any] | None = None,
    rows_per_block: int = 65536,
) -> Iterator[Block]:
    """Sequences, labels and groups in any form that `DatasetWriter.add_task` accepts, as blocks."""
    if isinstance(sequences, np.ndarray):
        whole = sequences
        sequences = (whole[i : i + rows_per_block] for i in range(0, len(whole), rows_per_block))
    label_rows, values = (None, None) if labels is None else _label_arrays(labels)
    done = 0
    for chunk in sequences:
        block = chunk if isinstance(chunk, Block) else Block(np.asarray(chunk), first_line=done)
        n = len(block.items)
        if label_rows is not None and values is not None:
            first, last = np.searchsorted(label_rows, [done, done + n])
            block.label_rows, block.label_values = label_rows[first:last] - done, values[first:last]
        if groups is not None:
            block.groups = np.asarray(groups[done : done + n])
            if len(block.groups) != n:
                raise DataError("groups", f"got {len(groups)} groups for more rows; expected one group per row")
        done += n
        yield block
    if label_rows is not None and len(label_rows) and not 0 <= label_rows[0] <= label_rows[-1] < done:
        raise DataError("labels", f"got label rows {label_rows[0]} to {label_rows[-1]}; expected 0 to {done - 1}")
    if groups is not None and len(groups) != done:
        raise DataError("groups", f"got {len(groups)} groups for {done} rows; expected one group per row")


def _label_arrays(labels: RawIds | LabelArrays) -> LabelArrays:
    """Labels as (rows ascending, values)."""
    if not isinstance(labels, tuple):
        values = np.asarray(labels)
        return np.arange(len(values), dtype=np.int64), values
    rows, values = np.asarray(labels[0]), np.asarray(labels[1])
    if rows.shape != values.shape or rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise DataError("labels", f"got rows {rows.dtype}{rows.shape} and values {values.shape}; expected 1-D arrays of equal "
                        "length, the rows integers")  # fmt: skip
    order = np.argsort(rows, kind="stable")
    return rows[order].astype(np.int64), values[order]
