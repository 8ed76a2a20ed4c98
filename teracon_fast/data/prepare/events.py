"""Any event log (user, item, time) in Parquet or CSV; label columns become tasks."""

from __future__ import annotations

import csv
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from teracon_fast.data.dictionaries import Dictionary, DictionaryBuilder, as_numbers
from teracon_fast.data.prepare.assemble import TaskRows, task_of_users, write_tasks
from teracon_fast.data.prepare.preparer import Summary, WriterOptions
from teracon_fast.data.prepare.tables import first_true, import_polars, read_columns, require_file
from teracon_fast.data.prepare.windows import Histories, choose_windows, cut, group_by_user
from teracon_fast.errors import ConfigError, DataError


def prepare_events(
    source: Path,
    output: Path,
    writer: WriterOptions,
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
) -> Summary:
    """Your own log: a Parquet or CSV file with one event per row (user, item, time); label columns become tasks.

    T1 (`next_item`) predicts the next item of a user's events in time order; events at equal times keep the order of the file,
    which may be in any order. Each label column is a further task with one label per user, on the same rows as T1; a user
    without a value (empty or NaN) is left out of that task only. Users and items may be integers or text; dictionaries are in
    ascending order, numeric if all ids are whole numbers. Text users are numbered in that order, and `users.parquet` (id, index)
    in the prepared folder records the numbers. With `extend`, users in the earlier folder's `users.parquet` keep their numbers,
    and so their part of a split by user.

    Args:
        source: `.parquet` or `.csv` file (comma-separated, with a header).
        output: prepared folder to create.
        writer: passed to the `DatasetWriter`.
        user: name of the user column.
        item: name of the item column. Item 0 is refused, since 0 is the pad; see --item-prefix.
        time: name of the time column: numbers, dates or date-times (ISO 8601 in CSV).
        labels: names of the label columns, in the order of their tasks.
        label_value: "last" takes a user's latest value, "constant" refuses users with different values.
        length: items per row, left-padded.
        windows: "last" takes one window per user, the latest; "several" takes the whole history (then split by user).
        stride: with "several", events between the ends of two windows; none: the length, so that windows do not overlap.
        max_windows: with "several", number of windows per user, the latest ones; none: all.
        min_items: skip windows with fewer real items.
        item_prefix: text prepended to every item id, for a log whose items are numbered from 0.

    Raises:
        DataError: no such file, a column missing or of the wrong type, an empty or NaN user, item or time, the pad as an item,
            no window left; names file and row (Parquet, from 0) or line (CSV, from 1).
        ConfigError: an option is out of range.
    """
    columns = [user, item, time, *labels]
    if len(set(columns)) < len(columns):
        raise ConfigError(f"columns: got {', '.join(columns)}; expected distinct names")
    if "next_item" in labels:
        raise ConfigError("--labels: got a column named 'next_item', as is the first task; rename it")
    if length < 2 or not 1 <= min_items <= length:
        raise ConfigError(f"--length {length}, --min-items {min_items}: expected a length of at least 2, and 1 to length items")
    for name, value in (("stride", stride), ("max-windows", max_windows)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: expected at least 1")
        if value is not None and windows == "last":
            raise ConfigError(f"--{name} {value} without --windows several: the only window of a user is the latest")
    log = _EventFile(Path(source), columns)

    user_names, users = log.users(user)
    notes = []
    if user_names is not None and writer.extend is not None:
        earlier = writer.extend / "users.parquet"
        if earlier.is_file():
            user_names, users = _extended(Dictionary.load(earlier), user_names, users)
        else:
            notes.append(f"{writer.extend} has no users.parquet: users are renumbered, which changes a split by user")
    histories = group_by_user(users, log.times(time))
    item_ids, item_codes = log.items(item, item_prefix)
    several = windows == "several"
    chosen = choose_windows(
        histories.starts, length, stride=stride, max_windows=max_windows if several else 1, min_items=min_items
    )
    if len(chosen) == 0:
        raise DataError(log.path, f"got no user with {min_items} events")
    sequences = cut(item_codes[histories.order], chosen, length)
    groups = histories.users[chosen.owner]
    tasks = [TaskRows("next_item", "next_item", sequences, groups)]
    for column in labels:
        position, values = log.labels(column, histories, constant=label_value == "constant")
        task = task_of_users(column, histories.users[position], values, sequences, groups)
        if len(task.groups) == 0:
            raise DataError(log.path, f"column {column!r}: got no value for any user with {min_items} events")
        tasks.append(task)
    left_out = len(histories.users) - len(np.unique(chosen.owner))
    notes += [f"{left_out:,} users skipped: no window of {min_items} events"] if left_out else []
    about = {
        "preparer": "events", "file": log.path.name, "user": user, "item": item, "time": time, "labels": list(labels),
        "label_value": label_value, "item_prefix": item_prefix, "length": length, "windows": windows, "stride": stride,
        "max_windows": max_windows, "min_items": min_items,
    }  # fmt: skip
    summary = write_tasks(output, writer, log.path.stem, item_ids, tasks, about, notes)
    if user_names is not None:
        Dictionary(user_names).save(output / "users.parquet")
    return summary


def _extended(known: Dictionary, names: list[str], users: NDArray[np.int64]) -> tuple[list[str], NDArray[np.int64]]:
    """Names and numbers of the users: those of `known` keep their numbers, the others follow."""
    builder = DictionaryBuilder(False, known)
    codes = builder.add(np.array(names, dtype=object))
    found, index_of_code = builder.finish()
    return found.ids.tolist(), index_of_code[codes][users].astype(np.int64)


class _EventFile:
    """The columns needed of an event log, each checked when read."""

    def __init__(self, path: Path, columns: list[str]) -> None:
        self.path = path
        self.is_csv = path.suffix.lower() == ".csv"
        self._polars = import_polars()
        if self.is_csv:
            self._table = self._read_csv(columns)
        elif path.suffix.lower() in (".parquet", ".pq"):
            self._table = read_columns(path, columns, filled=())
        else:
            raise DataError(path, f"got a file ending in {path.suffix!r}; expected .parquet or .csv")

    def _read_csv(self, columns: list[str]) -> Any:
        require_file(self.path, f"CSV with the columns {', '.join(columns)}")
        with open(self.path, encoding="utf-8-sig", errors="replace", newline="") as file:
            lines = csv.reader(file)
            header = next(lines, [])
            missing = [name for name in columns if name not in header]
            if missing:
                raise DataError(self.path, f"no column {missing[0]!r}; the header has {', '.join(header)}", line=1)
            for fields in lines:
                if fields and len(fields) != len(header):  # polars would fill it, or not say which line it is
                    reason = f"got {len(fields)} fields; expected {len(header)}, as in the header"
                    raise DataError(self.path, reason, line=lines.line_num)
        # Ids and labels stay text, so that "007" and "7" stay distinct; the type of time is inferred from the whole column.
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
            raise DataError(self.path, "got no rows below the header")
        return table.head(filled[-1] + 1)  # without blank lines at the end

    def _refuse(self, wrong: NDArray[np.bool_], column: str, expected: str) -> None:
        row = first_true(wrong)
        if row is None:
            return
        got = self._table[column][row]
        found = "an empty value" if got is None or (isinstance(got, str) and not got) else repr(str(got))
        line = row + 2 if self.is_csv else row
        raise DataError(self.path, f"column {column!r}: got {found}; expected {expected}", line)

    def times(self, column: str) -> NDArray[Any]:
        """[E] numbers that order the events."""
        values = self._table[column]
        self._refuse(values.is_null().to_numpy(), column, "a time")
        dtype = values.dtype
        if dtype.is_temporal():
            return np.asarray(values.to_physical())
        if not dtype.is_numeric():
            expected = f"numbers, dates or date-times in all rows, not {dtype}"
            self._refuse(self._no_times(values), column, expected)
        if dtype.is_float():
            self._refuse(~values.is_finite().to_numpy(), column, "a finite time")
        return np.asarray(values)

    def _no_times(self, values: Any) -> NDArray[np.bool_]:
        """bool [E]: the rows that are not numbers, if others are; else those that are not dates, if others are; else all."""
        wrong = values.is_null()  # none
        if values.dtype == self._polars.String:
            wrong = values.cast(self._polars.Float64, strict=False).is_null()
            if wrong.all():
                with suppress(self._polars.exceptions.PolarsError):  # no row is a date
                    wrong = values.str.to_datetime(strict=False).is_null()
        found: NDArray[np.bool_] = wrong.to_numpy()
        return found if found.any() else np.ones(len(values), dtype=bool)

    def users(self, column: str) -> tuple[list[str] | None, NDArray[np.int64]]:
        """int64 [E] user of each event; text users are positions in the returned list of names."""
        values = self._ids(column)
        if values.dtype == self._polars.Int64:
            return None, np.asarray(values)
        names, codes = self._coded(values)
        return names, codes.astype(np.int64)

    def items(self, column: str, prefix: str) -> tuple[NDArray[Any], NDArray[np.int32]]:
        """The distinct item ids, ascending, and int32 [E] codes: code k stands for id k - 1."""
        values = self._ids(column)
        if prefix:
            values = prefix + values.cast(self._polars.String)
        pad = (values.cast(self._polars.String) == "0").to_numpy()
        self._refuse(pad, column, "another id, since 0 is the pad; --item-prefix renames all items")
        if values.dtype == self._polars.Int64:
            ids, codes = np.unique(values.to_numpy(), return_inverse=True)
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
            self._refuse(wrong, column, "the user's earlier value; --label-value last takes the latest")
        last = np.append(owner[1:] != owner[:-1], True)[: len(owner)]
        return owner[last], values.gather(rows[last]).to_numpy()

    def _ids(self, column: str) -> Any:
        """A column of ids, none of them empty: Int64 if all are whole numbers, else String."""
        values = self._values(column, missing_is_error=True)
        if values.dtype == self._polars.String:
            distinct = values.unique().to_list()
            if as_numbers(distinct) is not None:
                return values.cast(self._polars.Int64)
        return values

    def _values(self, column: str, missing_is_error: bool) -> Any:
        """A column as Int64 or String, null if empty or NaN."""
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
            raise DataError(self.path, f"column {column!r}: got {dtype}; expected integers or text")
        if values.dtype == polars.String:
            nothing = values.str.strip_chars().str.to_lowercase().is_in(["", "nan"])
            values = values.set(nothing, None)
        if missing_is_error:
            self._refuse(values.is_null().to_numpy(), column, expected)
        return values

    def _coded(self, values: Any) -> tuple[list[str], NDArray[np.int32]]:
        """The distinct texts, ascending, and the int32 [E] position of each value among them."""
        text = values.cast(self._polars.String)
        names: list[str] = sorted(text.unique().to_list())
        return names, text.cast(self._polars.Enum(names)).to_physical().to_numpy().astype(np.int32)
