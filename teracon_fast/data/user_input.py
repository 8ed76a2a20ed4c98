"""Input of a trained model: users from CSV, Parquet or a prepared folder, in blocks, with key columns that identify each row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from teracon_fast.data import Dictionary, open_dataset, pad_left, read_sequences_csv
from teracon_fast.data.dictionaries import pyarrow
from teracon_fast.data.parquet import open_parquet, read_batches, read_lists, require_columns
from teracon_fast.errors import ConfigError, DataError

Unseen = Literal["error", "pad", "drop", "bucket"]
UNSEEN = ("error", "pad", "drop", "bucket")
Encode = Callable[[NDArray[Any]], NDArray[np.int32]]
USER_COLUMNS = ("user", "user_id", "household", "household_id")
ITEM_COLUMNS = ("items", "sequence", "item_ids", "history")


@dataclass(frozen=True)
class InputBlock:
    """Consecutive users: `x` int32 `[n, L]`, item indices of the run, and an Arrow array of n values for each key column."""

    x: NDArray[np.int32]
    keys: list[Any]


@dataclass(frozen=True)
class _Found:
    """Rows as read: `codes` int32 `[n, m]`, m at most L, negative for unseen items (-1 - b if mapped to index b), whose raw ids
    are `unseen`, row by row; row r is line or row `first_line + r` of its source."""

    codes: NDArray[np.int32]
    keys: list[Any]
    unseen: NDArray[Any]
    first_line: int


class Inputs:
    """Users in blocks.

    Args:
        path: .csv or .txt file (`id,id,...` a line; labels after `,,` are ignored), .parquet file, or prepared folder.
        items: item dictionary of the run.
        length: L of the run. Shorter rows are padded on the left, longer ones truncated to their most recent items.
        unseen: an item that the run has not seen is refused ("error"), replaced by the pad 0 ("pad"), removed ("drop"), or
            replaced by its bucket, a hash of its raw id ("bucket", for data prepared with buckets). Only the L most recent
            items count.
        task: of a prepared folder: the task whose sequences to read, from 1.
        user_column: of a Parquet file; None: the first of USER_COLUMNS that it has, if any.
        items_column: of a Parquet file, a list column; None: the first of ITEM_COLUMNS that it has.

    Attributes:
        unseen_items: number of unseen items in the blocks read so far. unseen_users: number of users with such items.

    Key columns: `line` (CSV, from 1); the user column, else `row` (Parquet, from 0); `row` and `group` (prepared folder).

    Raises:
        ConfigError: unknown kind of file, no such task, or no buckets. DataError: file missing, columns missing or of the
            wrong type.
    """

    def __init__(
        self,
        path: str | Path,
        items: Dictionary,
        length: int,
        unseen: Unseen = "error",
        task: int = 1,
        user_column: str | None = None,
        items_column: str | None = None,
    ) -> None:
        self.path, self.length, self.unseen = Path(path), length, unseen
        self.unseen_items = self.unseen_users = 0
        check_unseen(unseen, items)
        if not self.path.exists():
            raise DataError(self.path, "no such file or folder")
        encode = partial(encode_items, items, unseen)
        self._source: _Csv | _Parquet | _Prepared
        if self.path.is_dir():
            self._source = _Prepared(self.path, encode, length, task)
        elif self.path.suffix == ".parquet":
            self._source = _Parquet(self.path, encode, length, user_column, items_column)
        elif self.path.suffix in (".csv", ".txt"):
            self._source = _Csv(self.path, encode, length)
        else:
            raise ConfigError(f"input: got {str(path)!r}; expected a .csv, .txt or .parquet file or a prepared folder")

    def keys(self) -> list[tuple[str, Any]]:
        """Name and Arrow type of each key column."""
        return self._source.keys

    def total(self) -> int:
        """Number of users (of a CSV: of lines, counted by reading it)."""
        return self._source.total()

    def blocks(self, size: int) -> Iterator[InputBlock]:
        """The users in the order of the file, at most `size` at a time.

        Raises:
            DataError: a malformed row or an unseen item; names file and line (CSV, from 1) or row (others, from 0).
        """
        for found in self._source.blocks(size):
            yield InputBlock(self._fitted(found), found.keys)

    def _fitted(self, found: _Found) -> NDArray[np.int32]:
        missing = found.codes < 0
        self.unseen_items += int(missing.sum())
        self.unseen_users += int(missing.any(1).sum())
        if missing.any() and self.unseen == "error":
            item = str(found.unseen[0])
            reason = f"got item {item!r}, which the run has not seen; --unseen pad, drop or bucket accepts it"
            raise DataError(self.path, reason, found.first_line + int(missing.any(1).argmax()))
        return fit(found.codes, self.unseen, self.length)


def check_unseen(unseen: Unseen, items: Dictionary) -> None:
    """ConfigError if a policy for unseen items is unknown, or is "bucket" and the dictionary has no buckets."""
    if unseen not in UNSEEN:
        raise ConfigError(f"--unseen: got {unseen!r}; expected one of {', '.join(UNSEEN)}")
    if unseen == "bucket" and not items.buckets:
        raise ConfigError(
            "--unseen: got 'bucket', but the run has no buckets; expected error, pad or drop, or data prepared with "
            "--min-count and --buckets"
        )


def encode_items(items: Dictionary, unseen: Unseen, values: NDArray[Any]) -> NDArray[np.int32]:
    """Item indices of raw ids, int32 of their shape; for an unseen one `-1 - b` with b its bucket ("bucket") or 0."""
    codes = items.encode(values)
    missing = codes < 0
    if unseen == "bucket" and missing.any():
        codes[missing] = -1 - items.bucket_of(values[missing])
    return codes


def fit(codes: NDArray[np.int32], unseen: Unseen, length: int) -> NDArray[np.int32]:
    """Rows of `encode_items` as int32 `[n, length]`, left-padded; unseen items are treated as the policy says."""
    missing = codes < 0
    kept = ~missing if unseen == "drop" else np.ones_like(missing)
    offsets = np.concatenate([[0], np.cumsum(kept.sum(1))])
    fitted: NDArray[np.int32] = pad_left(np.where(missing, -1 - codes, codes)[kept], offsets, length)
    return fitted


class _Csv:
    def __init__(self, path: Path, encode: Encode, length: int) -> None:
        self._path, self._encode, self._length = path, encode, length
        with path.open("rb") as file:
            self._labels = b",," in file.readline()
        self.keys: list[tuple[str, Any]] = [("line", pyarrow().int64())]

    def total(self) -> int:
        lines, last = 0, b"\n"
        with self._path.open("rb") as file:
            while chunk := file.read(1 << 20):
                lines, last = lines + chunk.count(b"\n"), chunk[-1:]
        return lines + (last != b"\n")

    def blocks(self, size: int) -> Iterator[_Found]:
        reader = read_sequences_csv(self._path, self._labels, length=self._length, pad="left", empty_labels="skip")
        for block in reader:
            codes = self._encode(block.items)
            for low in range(0, len(codes), size):
                part, first = codes[low : low + size], block.first_line + low
                keys = [pyarrow().array(np.arange(first, first + len(part)))]
                yield _Found(part, keys, block.items[low : low + size][part < 0], first)


class _Prepared:
    def __init__(self, path: Path, encode: Encode, length: int, task: int) -> None:
        dataset = open_dataset(path)
        if not 1 <= task <= len(dataset.tasks):
            raise ConfigError(f"{path}: got task {task}; expected 1 to {len(dataset.tasks)}")
        self._task, self._ids = dataset.tasks[task - 1], dataset.item_ids()
        self._codes, self._length = encode(self._ids), length
        self.keys: list[tuple[str, Any]] = [("row", pyarrow().int64()), ("group", pyarrow().int64())]

    def total(self) -> int:
        return len(self._task.sequences)

    def blocks(self, size: int) -> Iterator[_Found]:
        for low in range(0, self.total(), size):
            rows = np.asarray(self._task.sequences[low : low + size, -self._length :])
            groups = np.asarray(self._task.groups[low : low + size])
            keys = [pyarrow().array(np.arange(low, low + len(rows))), pyarrow().array(groups)]
            codes = self._codes[rows]
            yield _Found(codes, keys, self._ids[rows[codes < 0]], low)


class _Parquet:
    def __init__(self, path: Path, encode: Encode, length: int, user: str | None, column: str | None) -> None:
        self._path, self._encode, self._length = path, encode, length
        with open_parquet(path) as file:
            schema, self._rows = file.schema_arrow, int(file.metadata.num_rows)
        names = schema.names
        self._user = user or next((name for name in USER_COLUMNS if name in names), None)
        items = column or next((name for name in ITEM_COLUMNS if name in names), None)
        if items is None:
            expected = f"one of {', '.join(ITEM_COLUMNS)} or --items-column"
            raise DataError(path, f"got columns {', '.join(names)}; expected item lists in {expected}")
        self._items = items
        self._columns = [items] if self._user is None else [items, self._user]
        require_columns(path, names, self._columns)
        key = ("row", pyarrow().int64()) if self._user is None else (self._user, schema.field(self._user).type)
        self.keys: list[tuple[str, Any]] = [key]

    def total(self) -> int:
        return self._rows

    def blocks(self, size: int) -> Iterator[_Found]:
        for first, batch in read_batches(self._path, self._columns, size):
            values, offsets = read_lists(self._path, batch.column(0), self._items, first)
            codes = pad_left(self._encode(values), offsets, self._length)
            rows, columns = np.nonzero(codes < 0)
            unseen = values[offsets[rows + 1] - self._length + columns]
            key = pyarrow().array(np.arange(first, first + len(codes))) if self._user is None else batch.column(1)
            yield _Found(codes, [key], unseen, first)
