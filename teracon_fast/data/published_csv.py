"""The published CSV: one line per user, `id,id,...,id` (task 1) or `id,id,...,id,,label[,label...]` (later tasks).

Ids are whole numbers, oldest item first, left-padded with 0 to equal length. The file is streamed in blocks, each parsed at once
by numpy; the offending line is located only if a check fails.

Unlike the published reader, this one keeps the last character of a last line without newline, accepts CRLF and a UTF-8 byte
order mark, and refuses anything else outside the format, naming file, line and reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from teracon_fast.data.blocks import Block, checked_source, pad_left
from teracon_fast.errors import DataError

Ints = npt.NDArray[np.int64]

_COMMA, _NEWLINE, _ZERO = ord(","), ord("\n"), ord("0")
_MAX_DIGITS = 18  # every number of 18 digits fits int64
_MAX_LINE_BYTES = 64 << 20
_FOREIGN = {
    b"\x1f\x8b": "gzip-compressed",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "Parquet",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}


def read_sequences_csv(
    path: str | Path,
    labels: bool,
    *,
    length: int | None = None,
    pad: Literal["none", "left"] = "none",
    empty_labels: Literal["error", "skip"] = "error",
    block_bytes: int = 8 << 20,
) -> Iterator[Block]:
    """Read a published CSV in blocks of rows, ready for `DatasetWriter.add_task`.

    Accepted: CRLF, a byte order mark, a last line without newline, blank lines at the end of the file; rows of only pads, the
    pad 0 anywhere in a row, a label repeated in a row (the writer reports the last three).

    Args:
        path: the file.
        labels: whether lines have labels after `,,`; if they do not match, the file is refused.
        length: L, items per row. None: that of the first row (pad="none") or of the longest (pad="left", one more pass).
        pad: "none" refuses rows that do not have exactly `length` items; "left" pads shorter rows with 0 on the left and
            truncates longer ones to their newest `length` items.
        empty_labels: "error" refuses a row with no label or an empty one; "skip" ignores empty labels but keeps the row.
        block_bytes: bytes parsed at once.

    Yields:
        `Block`s with items int64 [n, L] and, with labels, label_rows and label_values int64 [m].

    Raises:
        DataError: names file and line: no such file, empty file, another file format, an id that is not a whole number of at
            most 18 digits without sign and leading zero, NUL bytes, an empty id, a blank line between rows, rows of unequal
            length, missing or unexpected labels.
    """
    path = checked_source(path, length, empty_labels)
    if pad not in ("none", "left"):
        raise DataError(path, f"padding: got {pad!r}; expected 'none' or 'left'")

    def blocks(length: int | None) -> Iterator[Block]:
        if length is None and pad == "left":
            tables = (_Tokens.of(path, *part) for part in _text_blocks(path, block_bytes))
            length = max(int(_item_counts(table, labels).max(initial=0)) for table in tables)
            if length == 0:
                raise DataError(path, "got no items")
        for text, first_line in _text_blocks(path, block_bytes):
            tokens = _Tokens.of(path, text, first_line)
            counts = _item_counts(tokens, labels)
            if length is None:
                length = int(counts[0])
            values = tokens.values()
            if pad == "left":
                items = pad_left(values, np.stack([tokens.first, tokens.first + counts]), length)
            elif (counts != length).any():
                row = int((counts != length).argmax())
                raise tokens.error(row, f"got {counts[row]} items; expected {length} in every row (--length pads and truncates)")
            elif len(values) == len(counts) * length:
                items = values.reshape(-1, length)
            else:
                items = values[tokens.first[:, None] + np.arange(length)]
            block = Block(items, path=path, first_line=first_line)
            if labels:
                block.label_rows, block.label_values = _labels(tokens, counts, values, empty_labels)
            yield block

    return blocks(length)


def _text_blocks(path: Path, block_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Whole lines as (bytes ending in a newline, number of the first line), without blank lines at the end of the file."""
    line, blank_line, rows = 1, 0, 0
    with open(path, "rb") as file:
        head = file.read(4)
        for magic, what in _FOREIGN.items():
            if head.startswith(magic):
                raise DataError(path, f"got {what}; expected plain text")
        file.seek(3 if head.startswith(b"\xef\xbb\xbf") else 0)
        while chunk := file.read(block_bytes):
            end = file.readline(_MAX_LINE_BYTES)
            if len(end) == _MAX_LINE_BYTES and not end.endswith(b"\n"):
                at = line + chunk.count(b"\n")
                raise DataError(path, f"got a line of over {_MAX_LINE_BYTES >> 20} MiB; expected text", at)
            text = (chunk + end).replace(b"\r\n", b"\n")
            kept = text.rstrip(b"\n")
            if kept:
                if blank_line:
                    raise DataError(path, "got a blank line between rows", blank_line)
                kept += b"\n"
                rows += 1
                yield kept, line
            if len(kept) < len(text):
                blank_line = blank_line or line + kept.count(b"\n")
            line += text.count(b"\n")
    if not rows:
        raise DataError(path, "got no rows")


@dataclass
class _Tokens:
    """The fields of a block of lines.

    Attributes:
        text: uint8, bytes of the lines.
        stop: [t] index of the separator after each field.
        size: [t] characters in each field, 0 if empty.
        first, last: [n] first and last field of each line.
    """

    path: Path
    first_line: int
    text: npt.NDArray[np.uint8]
    stop: Ints
    size: Ints
    first: Ints
    last: Ints

    @classmethod
    def of(cls, path: Path, text: bytes, first_line: int) -> _Tokens:
        """Split lines into fields; refuses blank lines and any byte other than digits, commas and newlines."""
        array = np.frombuffer(text, dtype=np.uint8)
        # uint8 wraps around below "0", so one comparison finds everything that is not a digit.
        stop = np.flatnonzero(array - np.uint8(_ZERO) > 9)
        separator = array[stop]
        newline = separator == _NEWLINE
        last = np.flatnonzero(newline)
        if len(last) + np.count_nonzero(separator == _COMMA) != len(stop):
            unexpected = ~newline & (separator != _COMMA)
            raise _unexpected_byte(path, text, int(stop[unexpected.argmax()]), first_line)
        size = np.diff(stop, prepend=-1) - 1
        first = np.concatenate([[0], last[:-1] + 1])
        tokens = cls(path, first_line, array, stop, size, first, last)
        blank = (first == last) & (size[first] == 0)
        if blank.any():
            raise tokens.error(int(blank.argmax()), "got a blank line between rows")
        return tokens

    def values(self) -> Ints:
        """[t] the number in each field; undefined for empty fields."""
        text, size = self.text, self.size
        longest = int(size.max())
        if longest > _MAX_DIGITS:
            raise self._bad_number(int(size.argmax()), f"at most {_MAX_DIGITS} digits")
        values = (text[self.stop - 1] - np.uint8(_ZERO)).astype(np.int64)
        for digits in range(2, longest + 1):
            fields = np.flatnonzero(size == digits)
            position = self.stop[fields] - digits
            number = (text[position] - np.uint8(_ZERO)).astype(np.int64)
            if len(number) and number.min() == 0:
                raise self._bad_number(int(fields[number.argmin()]), "no leading zero")
            for _ in range(digits - 1):
                position += 1
                number *= 10
                number += text[position] - np.uint8(_ZERO)
            values[fields] = number
        return values

    def row_of(self, token: int) -> int:
        return int(np.searchsorted(self.last, token))

    def error(self, row: int, reason: str) -> DataError:
        return DataError(self.path, reason, self.first_line + row)

    def _bad_number(self, token: int, expected: str) -> DataError:
        stop = int(self.stop[token])
        got = self.text[stop - int(self.size[token]) : stop].tobytes().decode()
        return self.error(self.row_of(token), f"got id {_shorten(got)}; expected {expected}")


def _item_counts(tokens: _Tokens, labels: bool) -> Ints:
    """[n] number of items in each line; refuses empty ids, and missing or unexpected labels."""
    empty = np.flatnonzero(tokens.size == 0)
    if not labels:
        if len(empty):
            row = tokens.row_of(int(empty[0]))
            if empty[0] == tokens.last[row]:
                raise tokens.error(row, "got a comma at the end of the line; expected an item id after it")
            raise tokens.error(row, "got an empty item id; expected ids only, without labels after ',,'")
        return tokens.last - tokens.first + 1
    rows = np.searchsorted(tokens.last, empty)
    counts = np.full(len(tokens.first), -1)
    # Assigned from the last empty field to the first, so that the first of each line wins.
    counts[rows[::-1]] = empty[::-1] - tokens.first[rows[::-1]]
    # In ",,label" the first field is the (empty) sequence, the second the gap between the commas.
    gap = tokens.first + np.maximum(counts, 1)
    bad = (counts < 0) | (gap >= tokens.last) | (tokens.size[np.minimum(gap, tokens.last)] > 0)
    if bad.any():
        row = int(bad.argmax())
        got = "an empty item id" if counts[row] == 0 else "no ',,' between items and labels"
        raise tokens.error(row, f"got {got}; expected 'id,id,...,id,,label'")
    return counts


def _labels(tokens: _Tokens, counts: Ints, values: Ints, empty_labels: str) -> tuple[Ints, Ints]:
    """Row and value of each label."""
    begin = tokens.first + np.maximum(counts, 1) + 1
    many = tokens.last - begin + 1
    rows = np.repeat(np.arange(len(begin)), many)
    fields = np.arange(len(rows)) + np.repeat(begin - (np.cumsum(many) - many), many)
    empty = tokens.size[fields] == 0
    if empty.any():
        if empty_labels == "error":
            raise tokens.error(int(rows[empty.argmax()]), "got an empty label after ',,'")
        rows, fields = rows[~empty], fields[~empty]
    return rows, values[fields]


def _unexpected_byte(path: Path, text: bytes, at: int, first_line: int) -> DataError:
    line = first_line + text.count(b"\n", 0, at)
    byte = text[at : at + 1]
    if byte == b"\0":
        return DataError(path, "got a NUL byte; expected digits and commas", line)
    if byte == b"\r":
        return DataError(path, "got a carriage return inside a line; expected lines ending in LF or CRLF", line)
    begin = max(text.rfind(b",", 0, at), text.rfind(b"\n", 0, at)) + 1
    got = re.split(rb"[,\n]", text[begin:], maxsplit=1)[0].decode("utf-8", "backslashreplace")
    header = " (a header line?)" if line == 1 and byte.isalpha() else ""
    expected = "a whole number (Parquet files may have ids of text)"
    return DataError(path, f"got id {_shorten(got)}{header}; expected {expected}", line)


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")
