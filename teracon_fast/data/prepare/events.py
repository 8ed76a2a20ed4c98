"""Any event log (user, item, time) in Parquet or CSV, with label columns that become tasks."""

from __future__ import annotations

import csv
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from teracon_fast.data.dictionaries import Dictionary, DictionaryBuilder, as_numbers
from teracon_fast.data.prepare.assemble import TaskRows, check_output, write_tasks
from teracon_fast.data.prepare.preparer import Summary
from teracon_fast.data.prepare.tables import first_true, import_polars, read_columns, require_file
from teracon_fast.data.prepare.windows import Histories, choose_windows, cut, group_by_user
from teracon_fast.errors import ConfigError, DataError


def prepare_events(
    source: Path,
    output: Path,
    *,
    user: str = "user",
    item: str = "item",
    time: str = "time",
    labels: tuple[str, ...] = (),
    label_value: Literal["last", "constant"] = "last",
    length: int = 100,
    windows: Literal["last", "several"] = "last",
    stride: int | None = None,
    max_windows: int | None = None,
    min_items: int = 2,
    item_prefix: str = "",
    extend: Path | None = None,
    min_count: int = 1,
    buckets: int | None = None,
    overwrite: bool = False,
) -> Summary:
    """Your own log: a Parquet or CSV file with one event a row (user, item, time), label columns become tasks.

    T1 (`next_item`) predicts the next item of a user's events in time order; equal times keep the order of the file, and the
    file may be in any order. Each label column is one further task with one label a user, on the same rows as T1; a user
    without a value (empty, or NaN) is left out of that task only. Users and items may be integers or text; dictionaries are
    in ascending order, of numbers where all ids are whole numbers. Text users are numbered in that order; `users.parquet`
    (id, index) in the prepared folder keeps the numbers. With `extend`, users that the earlier folder's `users.parquet` names
    keep their numbers too, and so their side of a split by user.

    Args:
        source: `.parquet` or `.csv` file (comma, header line).
        output: prepared folder to write.
        user: name of the user column.
        item: name of the item column. Item 0 is refused, because 0 is the pad: see `item_prefix`.
        time: name of the time column: numbers, dates or date-times (ISO 8601 in CSV).
        labels: names of the label columns, in the order of their tasks.
        label_value: "last" takes a user's latest value, "constant" refuses a user with two different values.
        length: items in a row, left-padded.
        windows: "last" cuts one window a user, the latest; "several" cuts the whole history (then split by user).
        stride: with "several", events between the ends of two windows; none: `length`, so that they do not overlap.
        max_windows: with "several", windows of each user, the latest; none: all.
        min_items: leave out windows with fewer real items.
        item_prefix: text put before every item id, for a log whose items are numbered from 0.
        extend: prepared folder or run folder whose items and labels keep their indices; new ones follow them.
        min_count: items that occur less often than this in T1 share the buckets.
        buckets: how many buckets rare items share, each by a hash of its id; none: those of `extend`.
        overwrite: replace an existing prepared folder.

    Raises:
        DataError: no such file, a column missing, an empty or NaN user, item or time, an item that is the pad, a column of
            another type, with file and row (Parquet, from 0) or line (CSV, from 1); no window left.
        ConfigError: an option is out of range.
    """
    began = _now()
    _check_options(user, item, time, labels, length, windows, stride, max_windows, min_items)
    check_output(output, overwrite)
    log = _EventFile(Path(source), [user, item, time, *labels])

    user_names, users = log.users(user)
    notes = []
    if user_names is not None and extend is not None:
        if (extend / "users.parquet").is_file():
            user_names, users = _extended(Dictionary.load(extend / "users.parquet"), user_names, users)
        else:
            notes.append(f"users numbered anew, so that a split by user is another one: {extend} has no users.parquet")
    histories = group_by_user(users, log.times(time))
    item_ids, item_codes = log.items(item, item_prefix)
    several = windows == "several"
    chosen = choose_windows(
        histories.starts, length, stride=stride, max_windows=max_windows if several else 1, min_items=min_items
    )
    if len(chosen) == 0:
        raise DataError(log.path, f"no user has {min_items} events")
    sequences = cut(item_codes[histories.order], chosen, length)
    groups = histories.users[chosen.owner]
    tasks = [TaskRows("next_item", "next_item", sequences, groups)]
    for column in labels:
        position, values = log.labels(column, histories, constant=label_value == "constant")
        known = np.zeros(len(histories.users), dtype=bool)
        known[position] = True
        rows = np.flatnonzero(known[chosen.owner])
        if len(rows) == 0:
            raise DataError(log.path, f"label column {column!r}: no user with {min_items} events has a value")
        of_row = values[np.searchsorted(position, chosen.owner[rows])]
        numbers = np.arange(len(rows), dtype=np.int64)
        tasks.append(TaskRows(column, "label", sequences[rows], groups[rows], numbers, of_row))
    left_out = len(histories.users) - len(np.unique(chosen.owner))
    notes += [f"{left_out:,} users left out: no window of {min_items} events"] if left_out else []
    options = {
        "length": length,
        "windows": windows,
        "stride": stride,
        "max_windows": max_windows,
        "min_items": min_items,
    }
    summary = write_tasks(
        output,
        name=log.path.stem,
        item_ids=item_ids,
        tasks=tasks,
        source={"preparer": "events", "file": log.path.name, "user": user, "item": item, "time": time,
                "labels": list(labels), "label_value": label_value, "item_prefix": item_prefix, **options},
        notes=notes,
        began=began,
        extend=extend,
        min_count=min_count,
        buckets=buckets,
        overwrite=overwrite,
    )  # fmt: skip
    if user_names is not None:
        Dictionary(user_names).save(output / "users.parquet")
    return summary


def _extended(known: Dictionary, names: list[str], users: NDArray[np.int64]) -> tuple[list[str], NDArray[np.int64]]:
    """Names and numbers of the users when those of `known` keep their numbers and the others follow them."""
    builder = DictionaryBuilder(False, known)
    codes = builder.add(np.array(names, dtype=object))
    found, index_of_code = builder.finish()
    return found.ids.tolist(), index_of_code[codes][users].astype(np.int64)


def _now() -> float:
    return time.perf_counter()  # a parameter of prepare_events is named time


def _check_options(
    user: str,
    item: str,
    time: str,
    labels: tuple[str, ...],
    length: int,
    windows: str,
    stride: int | None,
    max_windows: int | None,
    min_items: int,
) -> None:
    columns = [user, item, time, *labels]
    if len(set(columns)) < len(columns):
        raise ConfigError(f"columns {', '.join(columns)}: expected different names")
    if "next_item" in labels:
        raise ConfigError("labels: a column 'next_item' would have the name of the first task; rename the column")
    if length < 2 or not 1 <= min_items <= length:
        raise ConfigError(f"length {length}, min_items {min_items}: expected length >= 2 and 1 <= min_items <= length")
    for name, value in (("stride", stride), ("max_windows", max_windows)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value}: expected at least 1")
        if value is not None and windows == "last":
            raise ConfigError(f"{name} {value} has no meaning with windows=last; expected windows=several")


class _EventFile:
    """The needed columns of an event log, checked one at a time."""

    def __init__(self, path: Path, columns: list[str]) -> None:
        self.path = path
        self.is_csv = path.suffix.lower() == ".csv"
        self._polars = import_polars()
        if self.is_csv:
            self._table = self._read_csv(columns)
        elif path.suffix.lower() in (".parquet", ".pq"):
            self._table = read_columns(path, columns, filled=())
        else:
            raise DataError(path, "expected a .parquet or .csv file")

    def _read_csv(self, columns: list[str]) -> Any:
        require_file(self.path, f"CSV with the columns {', '.join(columns)}")
        with open(self.path, encoding="utf-8-sig", errors="replace", newline="") as file:
            header = next(csv.reader(file), [])
        missing = [name for name in columns if name not in header]
        if missing:
            raise DataError(self.path, f"no column {missing[0]!r}; the header has {', '.join(header)}", line=1)
        ragged = self._ragged_line(len(header))
        if ragged is not None:
            raise ragged
        # Ids and labels stay text, so that "007" and "7" stay two ids; the type of time comes from the whole column.
        text = {name: self._polars.String for name in columns if name != columns[2]}
        try:
            table = self._polars.read_csv(
                self.path, columns=columns, schema_overrides=text, infer_schema_length=None, try_parse_dates=True,
                encoding="utf8-lossy",
            )  # fmt: skip
        except self._polars.exceptions.PolarsError as error:
            raise DataError(self.path, f"not readable as CSV: {error}") from error
        blank = table.select(self._polars.all_horizontal(self._polars.all().is_null())).to_series().to_numpy()
        filled = np.flatnonzero(~blank)
        if len(filled) == 0:
            raise DataError(self.path, "no rows below the header")
        return table.head(filled[-1] + 1)  # without the blank lines at the end

    def _ragged_line(self, expected: int) -> DataError | None:
        """The first line with another number of fields than the header: polars would fill or refuse it without a line."""
        with open(self.path, encoding="utf-8-sig", errors="replace", newline="") as file:
            lines = csv.reader(file)
            for fields in lines:
                if fields and len(fields) != expected:
                    reason = f"got {len(fields)} fields; expected {expected} as in the header"
                    return DataError(self.path, reason, line=lines.line_num)
        return None

    def _refuse(self, wrong: NDArray[np.bool_], column: str, expected: str) -> None:
        row = first_true(wrong)
        if row is None:
            return
        got = self._table[column][row]
        found = "empty" if got is None or (isinstance(got, str) and not got) else repr(str(got))
        raise DataError(self.path, f"column {column!r} is {found}; expected {expected}", line=self._line(row))

    def _line(self, row: int) -> int:
        return row + 2 if self.is_csv else row

    def times(self, column: str) -> NDArray[Any]:
        """[E] numbers that order the events."""
        values = self._table[column]
        self._refuse(values.is_null().to_numpy(), column, "a time")
        dtype = values.dtype
        if dtype.is_temporal():
            return _array(values.to_physical())
        if not dtype.is_numeric():
            expected = f"numbers, dates or date-times in all rows, not {dtype}"
            self._refuse(self._no_times(values), column, expected)
        if dtype.is_float():
            self._refuse(~values.is_finite().to_numpy(), column, "a finite time")
        return _array(values)

    def _no_times(self, values: Any) -> NDArray[np.bool_]:
        """[E] rows that are no number where others are, else no date where others are; all where no such row stands out."""
        wrong = values.is_null()  # none
        if values.dtype == self._polars.String:
            wrong = values.cast(self._polars.Float64, strict=False).is_null()
            if wrong.all():
                with suppress(self._polars.exceptions.PolarsError):  # no row is a date
                    wrong = values.str.to_datetime(strict=False).is_null()
        found: NDArray[np.bool_] = wrong.to_numpy()
        return found if found.any() else np.ones(len(values), dtype=bool)

    def users(self, column: str) -> tuple[list[str] | None, NDArray[np.int64]]:
        """int64 [E] user of each event; for text users also the texts, whose positions are the users."""
        values = self._ids(column)
        if values.dtype == self._polars.Int64:
            return None, _array(values)
        names, codes = self._coded(values)
        return names, codes.astype(np.int64)

    def items(self, column: str, prefix: str) -> tuple[NDArray[Any], NDArray[np.int32]]:
        """The distinct item ids, ascending, and int32 [E] codes: code k stands for id k - 1."""
        values = self._ids(column)
        if prefix:
            values = prefix + values.cast(self._polars.String)
        pad = (values.cast(self._polars.String) == "0").to_numpy()
        self._refuse(pad, column, "another id, because 0 is the pad; option item_prefix renames all items")
        if values.dtype == self._polars.Int64:
            ids, codes = np.unique(_array(values), return_inverse=True)
            return ids, codes.astype(np.int32) + 1
        names, text_codes = self._coded(values)
        return np.array(names, dtype=object), text_codes + 1

    def labels(self, column: str, histories: Histories, constant: bool) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """The latest known value of each user that has one.

        Returns:
            int64 [K] positions in `histories.users`, ascending; [K] values, integers or text.
        """
        values = self._values(column, missing_is_error=False)
        known = values.is_not_null().to_numpy()
        events = np.flatnonzero(known[histories.order])
        owner = np.searchsorted(histories.starts, events, side="right") - 1
        rows = histories.order[events]
        if constant:
            _, codes = self._coded(values.fill_null(0 if values.dtype == self._polars.Int64 else ""))
            changed = (np.diff(owner) == 0) & (np.diff(codes[rows]) != 0)
            wrong = np.zeros(len(known), dtype=bool)
            wrong[rows[1:][changed]] = True
            self._refuse(wrong, column, "the user's earlier value, one a user; label_value=last takes the latest")
        last = np.append(owner[1:] != owner[:-1], True)[: len(owner)]
        return owner[last], values.gather(rows[last]).to_numpy()

    def _ids(self, column: str) -> Any:
        """A column of ids as Int64, where all are whole numbers, or String; nothing empty."""
        values = self._values(column, missing_is_error=True)
        if values.dtype == self._polars.String:
            distinct = values.unique().to_list()
            if as_numbers(distinct) is not None:
                return values.cast(self._polars.Int64)
        return values

    def _values(self, column: str, missing_is_error: bool) -> Any:
        """A column as Int64 or String, null where it is empty or NaN."""
        polars, values, expected = self._polars, self._table[column], "an integer or text"
        dtype = values.dtype
        if dtype == polars.Categorical or dtype == polars.Enum or dtype == polars.Boolean:
            values = values.cast(polars.String)
        elif dtype.is_float():
            values = values.fill_nan(None)
            whole = (values.is_null() | (values == values.floor()) & (values.abs() < 2.0**53)).to_numpy()
            if missing_is_error:
                self._refuse(values.is_null().to_numpy(), column, expected)
                self._refuse(~whole, column, expected)
            values = values.cast(polars.Int64 if whole.all() else polars.String)
        elif dtype.is_integer():
            fits = values.cast(polars.Int64, strict=False)
            self._refuse((fits.is_null() & values.is_not_null()).to_numpy(), column, "an integer of 64 bits")
            values = fits
        elif dtype == polars.Null:
            values = values.cast(polars.String)
        elif dtype != polars.String:
            raise DataError(self.path, f"column {column!r} holds {dtype}; expected integers or text")
        if values.dtype == polars.String:
            nothing = values.str.strip_chars().str.to_lowercase().is_in(["", "nan"])
            values = values.set(nothing, None)
        if missing_is_error:
            self._refuse(values.is_null().to_numpy(), column, expected)
        return values

    def _coded(self, values: Any) -> tuple[list[str], NDArray[np.int32]]:
        """The distinct texts, ascending, and int32 [E] positions in them."""
        text = values.cast(self._polars.String)
        names: list[str] = sorted(text.unique().to_list())
        return names, text.cast(self._polars.Enum(names)).to_physical().to_numpy().astype(np.int32)


def _array(values: Any) -> NDArray[Any]:
    array: NDArray[Any] = values.to_numpy()
    return array
