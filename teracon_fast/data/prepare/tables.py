"""Raw tables -> arrays, by polars; errors in text files name the first malformed line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from teracon_fast.data.parquet import require_columns
from teracon_fast.errors import DataError, TeraconError

Kind = Literal["int", "float", "text"]
_EXPECTED = {"int": "an integer", "float": "a number", "text": "text"}


def import_polars() -> Any:
    """The polars module, imported on first use; TeraconError if it is not installed."""
    try:
        import polars
    except ImportError as error:
        raise TeraconError("preparing raw data needs polars; install it with pip install 'teracon-fast[train]'") from error
    return polars


def require_file(path: Path, what: str) -> Path:
    """`path` itself; DataError if there is no such file."""
    if not path.is_file():
        raise DataError(path, f"no such file; expected {what}")
    return path


@dataclass(frozen=True)
class TextFormat:
    """The format of a text file of separated columns without quoting.

    Attributes:
        columns: (name, kind) from left to right.
        separator: one character, or one doubled ("::").
        header: whether the first line has the column names.
    """

    columns: tuple[tuple[str, Kind], ...]
    separator: str
    header: bool

    def describe(self) -> str:
        """What a line looks like, for messages."""
        return self.separator.join(name for name, _ in self.columns)


def read_text_table(path: Path, format: TextFormat) -> dict[str, NDArray[Any]]:
    """The columns of a text file: int64 [N], float64 [N] or object [N] (text).

    Blank lines at the end, CRLF, a byte order mark and a last line without newline are accepted.

    Raises:
        DataError: no such file, no rows, another header or number of fields, an empty or non-numeric field; names the line.
    """
    polars = import_polars()
    require_file(path, f"lines of {format.describe()}")
    _check_head(path, format)
    dtypes = {"int": polars.Int64, "float": polars.Float64, "text": polars.String}
    schema: dict[str, Any] = {}
    fillers = []
    for name, kind in format.columns:
        if schema and len(format.separator) == 2:
            # polars splits at single characters, so a doubled separator gives an empty column in between.
            fillers.append(f"before {name}")
            schema[fillers[-1]] = polars.String
        schema[name] = dtypes[kind]
    try:
        table = polars.read_csv(
            path, has_header=format.header, schema=schema, separator=format.separator[0], quote_char=None,
            encoding="utf8-lossy",
        )  # fmt: skip
    except polars.exceptions.PolarsError as error:
        raise _first_bad_line(path, format) or DataError(
            path, f"not readable; expected lines of {format.describe()}: {error}"
        ) from error
    names = [name for name, _ in format.columns]
    broken = sum(table[name].null_count() for name in names) + sum(table[name].count() for name in fillers)
    broken += sum(int((~table[name].is_finite()).sum()) for name, kind in format.columns if kind == "float")
    if broken:
        bad_line = _first_bad_line(path, format)
        if bad_line is not None:
            raise bad_line
        table = table.drop_nulls(names)  # only blank lines at the end
    if table.height == 0:
        raise DataError(path, f"got no rows; expected lines of {format.describe()}")
    return {name: table[name].to_numpy() for name in names}


def _check_head(path: Path, format: TextFormat) -> None:
    """Check the first line, from which polars would take the number of columns."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        head = next(file, "").rstrip("\r\n")
    if not head:
        raise DataError(path, f"got an empty first line; expected {format.describe()}", line=1)
    fields = head.split(format.separator)
    names = [name for name, _ in format.columns]
    if format.header and fields != names:
        raise DataError(path, f"got header {head!r}; expected {format.describe()!r}", line=1)
    if not format.header and len(fields) != len(names):
        raise DataError(path, f"got {head[:80]!r}; expected {len(names)} fields: {format.describe()}", line=1)


def _first_bad_line(path: Path, format: TextFormat) -> DataError | None:
    """The first malformed line, found by a slow second pass over a malformed file."""
    blank = None
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(islice(file, int(format.header), None), start=1 + int(format.header)):
            text = line.rstrip("\r\n")
            if not text:
                blank = blank or number
                continue
            if blank is not None:
                return DataError(path, f"got an empty line; expected {format.describe()}", line=blank)
            fields = text.split(format.separator)
            if len(fields) != len(format.columns):
                reason = (
                    f"got {len(fields)} fields in {text[:80]!r}; expected {len(format.columns)}: {format.describe()}"
                )
                return DataError(path, reason, line=number)
            for (name, kind), field in zip(format.columns, fields, strict=True):
                if not _is_valid(field, kind):
                    return DataError(path, f"got {name} {field[:40]!r}; expected {_EXPECTED[kind]}", line=number)
    return None


def _is_valid(field: str, kind: Kind) -> bool:
    if kind == "text":
        return bool(field)
    try:
        return math.isfinite(int(field) if kind == "int" else float(field))
    except (ValueError, OverflowError):
        return False


def read_columns(path: Path, columns: Sequence[str], *, filled: Sequence[str]) -> Any:
    """Some columns of a Parquet file, as a polars data frame.

    Args:
        path: the file.
        columns: columns to read.
        filled: those that must not have empty fields.

    Raises:
        DataError: no such file, not Parquet, a column missing, no rows, or an empty field (names the row, from 0).
    """
    polars = import_polars()
    require_file(path, f"Parquet with the columns {', '.join(columns)}")
    try:
        present = list(polars.read_parquet_schema(path))
        require_columns(path, present, columns)
        table = polars.read_parquet(path, columns=list(columns))
    except polars.exceptions.PolarsError as error:
        raise DataError(path, f"not readable as Parquet: {error}") from error
    if table.height == 0:
        raise DataError(path, "got no rows")
    for name in filled:
        row = first_true(table[name].is_null().to_numpy())
        if row is not None:
            raise DataError(path, f"column {name!r}: got an empty value; expected one", line=row)
    return table


def line_of_row(row: int, format: TextFormat) -> int:
    """Line (from 1) of a row (from 0) that `read_text_table` returned."""
    return row + 1 + int(format.header)


def first_true(mask: NDArray[np.bool_]) -> int | None:
    """Index of the first True in bool [n]; None if there is none."""
    position = int(mask.argmax()) if len(mask) else 0
    return position if len(mask) and mask[position] else None
