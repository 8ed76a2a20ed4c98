"""Reader of Parquet files: one row per user (or per window of a user's history), with a list column of item ids."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from teracon_fast.data.blocks import Block, RawIds, checked_source, pad_left
from teracon_fast.data.dictionaries import PAD, pyarrow
from teracon_fast.errors import DataError


def read_parquet(
    path: str | Path,
    items: str = "items",
    user: str | None = "user_id",
    labels: str | None = None,
    *,
    length: int | None = None,
    empty_labels: Literal["error", "skip"] = "error",
    rows_per_block: int = 65536,
) -> Iterator[Block]:
    """Read a Parquet file in blocks of rows, ready for `DatasetWriter.add_task`.

    Ids may be integers or strings; 0 or "0" is the pad, so no real item may have that id. Shorter sequences are padded on the
    left, longer ones truncated to their newest `length` items.

    Args:
        path: the file.
        items: column of lists of item ids (list, large list or fixed-size list of integers or strings), oldest first.
        user: column of user ids (integers or strings; strings become 63-bit hashes) for the split by user; None: each row is its
            own user.
        labels: column of labels, integers, strings or booleans, or lists of them; None: no labels.
        length: L; None: that of the longest list (one more pass over the item column).
        empty_labels: "error" refuses a null label or an empty list of labels; "skip" makes no sample from it.
        rows_per_block: rows read at once.

    Yields:
        `Block`s with items [n, L] (int64, or objects of type str), groups int64 [n] and labels.

    Raises:
        DataError: names file and row (from 0): no such file, not Parquet, a column missing or of the wrong type, nulls, no rows.
    """
    path = checked_source(path, length, empty_labels)

    def blocks(length: int | None) -> Iterator[Block]:
        if length is None:
            batches = read_batches(path, [items], rows_per_block)
            lists = (read_lists(path, batch.column(0), items, first) for first, batch in batches)
            length = max((int(np.diff(offsets).max(initial=0)) for _, offsets in lists), default=0)
            if length == 0:
                raise DataError(path, f"column {items!r} has no items")
        columns = [items, *([user] if user else []), *([labels] if labels else [])]
        rows = 0
        for first, batch in read_batches(path, columns, rows_per_block):
            values, offsets = read_lists(path, batch.column(0), items, first)
            pad: Any = PAD if values.dtype == object else 0
            block = Block(pad_left(values, offsets, length, pad), path=path, first_line=first)
            if user:
                block.groups = _groups(path, batch.column(1), user, first)
            if labels:
                column = batch.column(len(columns) - 1)
                block.label_rows, block.label_values = _labels(path, column, labels, first, empty_labels)
            rows += len(block.items)
            yield block
        if not rows:
            raise DataError(path, "got no rows")

    return blocks(length)


def open_parquet(path: Path) -> Any:
    """The `pyarrow.parquet.ParquetFile`; DataError if it is none."""
    pa = pyarrow()
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(path, f"not a Parquet file: {error}") from error


def require_columns(path: Path, present: Sequence[str], columns: Sequence[str]) -> None:
    """DataError if the file lacks one of `columns`."""
    for column in columns:
        if column not in present:
            raise DataError(path, f"no column {column!r}; the file has {', '.join(present)}")


def read_batches(path: Path, columns: list[str], rows_per_block: int) -> Iterator[tuple[int, Any]]:
    """Record batches of these columns in this order, each with the number of its first row; DataError if the file is not whole
    or lacks a column.
    """
    pa = pyarrow()
    with open_parquet(path) as file:
        require_columns(path, file.schema_arrow.names, columns)
        first = 0
        batches = file.iter_batches(rows_per_block, columns=columns)
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                raise DataError(path, f"not readable: {error}", first) from error
            if batch is None:
                return
            if batch.num_rows:
                yield first, batch.select(columns)
            first += batch.num_rows


def read_lists(path: Path, column: Any, name: str, first: int) -> tuple[RawIds, npt.NDArray[np.int64]]:
    """Flat values, int64 or objects of type str, and offsets [n+1] of a list column of a batch that begins at row `first`;
    DataError if they are not lists of integers or strings, or there is a null among them.
    """
    if not _is_list(column.type):
        raise DataError(path, f"column {name!r}: got {column.type}; expected lists of integers or strings")
    if column.null_count:
        raise DataError(path, f"column {name!r}: got null; expected a list", first + _first_null(column))
    offsets = np.concatenate([[0], np.cumsum(_list_sizes(column), dtype=np.int64)])
    flat = column.flatten()
    if flat.null_count:
        row = int(np.searchsorted(offsets, _first_null(flat), side="right")) - 1
        raise DataError(path, f"column {name!r}: got a null item; expected an id", first + row)
    return _ids(path, flat, name), offsets


def _ids(path: Path, column: Any, name: str) -> RawIds:
    """Values without nulls as int64, or as objects of type str."""
    pa = pyarrow()
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    if pa.types.is_boolean(kind):
        column, kind = column.cast(pa.int64()), pa.int64()
    if pa.types.is_integer(kind):
        try:
            return column.cast(pa.int64()).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid as error:
            raise DataError(path, f"column {name!r}: {error}") from error
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind):
        return column.cast(pa.string()).to_numpy(zero_copy_only=False)
    raise DataError(path, f"column {name!r}: got ids of type {kind}; expected integers or strings")


def _groups(path: Path, column: Any, name: str, first: int) -> npt.NDArray[np.int64]:
    if column.null_count:
        raise DataError(path, f"column {name!r}: got null; expected a user id", first + _first_null(column))
    ids = _ids(path, column, name)
    if ids.dtype != object:
        return ids
    digests = (hashlib.blake2b(str(raw).encode(), digest_size=8).digest() for raw in ids)
    return np.frombuffer(b"".join(digests), dtype="<i8") & np.int64(2**63 - 1)


def _labels(path: Path, column: Any, name: str, first: int, empty_labels: str) -> tuple[npt.NDArray[np.int64], RawIds]:
    """Row in the block and value of each label."""
    rows = np.arange(len(column))
    if _is_list(column.type):
        sizes = _list_sizes(column)
        if empty_labels == "error" and (sizes == 0).any():
            raise DataError(path, f"column {name!r}: got no label; expected at least one", first + int((sizes == 0).argmax()))
        rows, column = np.repeat(rows, sizes), column.flatten()
    if column.null_count:
        null = column.is_null().to_numpy(zero_copy_only=False)
        if empty_labels == "error":
            raise DataError(path, f"column {name!r}: got a null label", first + int(rows[null.argmax()]))
        rows, column = rows[~null], column.drop_null()
    return rows, _ids(path, column, name)


def _is_list(kind: Any) -> bool:
    types = pyarrow().types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _list_sizes(column: Any) -> npt.NDArray[np.int64]:
    """int64 [n] length of each list, 0 for null."""
    from pyarrow import compute

    sizes = compute.list_value_length(column).fill_null(0)
    return sizes.to_numpy(zero_copy_only=False).astype(np.int64)


def _first_null(column: Any) -> int:
    return int(column.is_null().to_numpy(zero_copy_only=False).argmax())
