"""The published CSV: what is read, what is refused and where."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from teracon_fast.data import read_sequences_csv
from teracon_fast.errors import DataError

TINY = 7  # bytes per block in some tests: every line crosses a block border


def read(path: Path, labels: bool, **options):
    """All blocks joined: items, label rows, label values."""
    blocks = list(read_sequences_csv(path, labels, **options))
    items = np.concatenate([block.items for block in blocks])
    if not labels:
        assert all(block.label_rows is None and block.label_values is None for block in blocks)
        return items, None, None
    starts = np.cumsum([0] + [len(block.items) for block in blocks])
    rows = np.concatenate([block.label_rows + start for block, start in zip(blocks, starts, strict=False)])
    return items, rows, np.concatenate([block.label_values for block in blocks])


def written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "file.csv"
    path.write_bytes(content)
    return path


ids = st.one_of(st.integers(0, 12), st.integers(0, 10**18 - 1))


@st.composite
def files(draw):
    """Rows of one length, labels of each row, and the ways a file may be written."""
    length = draw(st.integers(1, 6))
    rows = draw(st.lists(st.lists(ids, min_size=length, max_size=length), min_size=1, max_size=12))
    labels = [draw(st.lists(ids, min_size=1, max_size=3)) for _ in rows] if draw(st.booleans()) else None
    newline = draw(st.sampled_from(["\n", "\r\n"]))
    end = draw(st.sampled_from(["", newline, newline * 3]))
    mark = draw(st.sampled_from(["", "\ufeff"]))
    lines = [",".join(map(str, row)) for row in rows]
    if labels is not None:
        lines = [f"{line},,{','.join(map(str, own))}" for line, own in zip(lines, labels, strict=True)]
    return rows, labels, (mark + newline.join(lines) + end).encode()


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=files(), block_bytes=st.sampled_from([1, 2, 3, TINY, 64, 1 << 20]))
def test_round_trip(tmp_path: Path, case, block_bytes: int) -> None:
    rows, labels, content = case
    path = written(tmp_path, content)
    items, label_rows, label_values = read(path, labels is not None, block_bytes=block_bytes)
    assert items.dtype == np.int64
    np.testing.assert_array_equal(items, np.array(rows, dtype=np.int64))
    if labels is not None:
        assert [*zip(label_rows.tolist(), label_values.tolist(), strict=True)] == [
            (row, label) for row, own in enumerate(labels) for label in own
        ]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=8), min_size=1, max_size=10),
    length=st.integers(1, 6),
    block_bytes=st.sampled_from([3, 1 << 20]),
)
def test_pad_left_pads_and_keeps_the_newest(tmp_path: Path, rows, length: int, block_bytes: int) -> None:
    path = written(tmp_path, "\n".join(",".join(map(str, row)) for row in rows).encode())
    items, _, _ = read(path, False, length=length, pad="left", block_bytes=block_bytes)
    expected = [([0] * length + row)[-length:] for row in rows]
    np.testing.assert_array_equal(items, expected)
    longest, _, _ = read(path, False, pad="left", block_bytes=block_bytes)
    assert longest.shape[1] == max(map(len, rows))


def test_pad_left_with_labels_and_an_empty_history(tmp_path: Path) -> None:
    items, rows, values = read(written(tmp_path, b"4,,1\n,,2,3\n5,6,7,,1"), True, length=2, pad="left")
    np.testing.assert_array_equal(items, [[0, 4], [0, 0], [6, 7]])
    assert (rows.tolist(), values.tolist()) == ([0, 1, 1, 2], [1, 2, 3, 1])


def test_last_line_without_newline_keeps_its_last_character(tmp_path: Path) -> None:
    items, _, values = read(written(tmp_path, b"1,2,,3\n4,5,,67"), True)
    assert items.tolist() == [[1, 2], [4, 5]] and values.tolist() == [3, 67]


def test_pads_anywhere_and_repeated_labels_are_read_as_they_are(tmp_path: Path) -> None:
    items, rows, values = read(written(tmp_path, b"0,0,0,,0\n0,5,0,,7,7\n"), True)
    assert items.tolist() == [[0, 0, 0], [0, 5, 0]]
    assert (rows.tolist(), values.tolist()) == ([0, 1, 1], [0, 7, 7])


def test_empty_labels_can_be_skipped(tmp_path: Path) -> None:
    path = written(tmp_path, b"1,2,,\n1,2,,5,,6\n3,4,,8\n")
    items, rows, values = read(path, True, empty_labels="skip")
    assert len(items) == 3 and (rows.tolist(), values.tolist()) == ([1, 1, 2], [5, 6, 8])


def test_lines_of_blocks(tmp_path: Path) -> None:
    path = written(tmp_path, b"1\n2\n3\n4\n5\n")
    blocks = list(read_sequences_csv(path, False, block_bytes=4))
    found = {int(item): block.first_line + row for block in blocks for row, item in enumerate(block.items[:, 0])}
    assert found == {1: 1, 2: 2, 3: 3, 4: 4, 5: 5} and len(blocks) > 1


REFUSED = {
    # name: (content, labels, line, part of the reason)
    "ragged": (b"1,2\n3,4\n5\n", False, 3, "got 1 items; expected 2"),
    "too long": (b"1,2\n3,4,5\n", False, 2, "got 3 items; expected 2"),
    "ragged with labels": (b"1,2,,1\n3,,1\n", True, 2, "got 1 items; expected 2"),
    "not a number": (b"1,2\n3,x7\n", False, 2, "'x7'"),
    "header": (b"a,b\n1,2\n", False, 1, "header"),
    "negative": (b"1,2\n-1,2\n", False, 2, "'-1'"),
    "fraction": (b"1,2\n1,2.5\n", False, 2, "'2.5'"),
    "space": (b"1,2\n1, 2\n", False, 2, "' 2'"),
    "quotes": (b'1,2\n"1",2\n', False, 2, "'\"1\"'"),
    "not ascii": ("1,2\n1,٣\n".encode(), False, 2, "whole number"),
    "leading zero": (b"1,2\n1,02\n", False, 2, "'02'"),
    "double pad": (b"1,2\n00,2\n", False, 2, "'00'"),
    "19 digits": (b"1,2\n1,1000000000000000000\n", False, 2, "at most 18 digits"),
    "label not a number": (b"1,2,,3\n1,2,,F\n", True, 2, "'F'"),
    "label too large": (b"1,2,,3\n1,2,,1000000000000000000\n", True, 2, "at most 18 digits"),
    "NUL": (b"1,2\n1,\0\n", False, 2, "NUL"),
    "NUL padding after the last line": (b"1,2\n\0\0\0", False, 2, "NUL"),
    "old Mac line ends": (b"1,2\r3,4\r", False, 1, "carriage return"),
    "blank line between": (b"1,2\n\n3,4\n", False, 2, "blank line"),
    "several blank lines between": (b"1,2\n3,4\n\r\n\n\n3,4\n", False, 3, "blank line"),
    "blank first line": (b"\n1,2\n", False, 1, "blank line"),
    "trailing comma": (b"1,2\n3,\n", False, 2, "comma at the end of the line"),
    "empty id": (b"1,2\n,3\n", False, 2, "empty item id"),
    "labels in a task-1 file": (b"1,2\n1,2,,3\n", False, 2, "without labels"),
    "no labels": (b"1,2,,3\n1,2\n", True, 2, "no ',,'"),
    "single comma at the end": (b"1,2,,3\n1,2,\n", True, 2, "no ',,'"),
    "empty label": (b"1,2,,3\n1,2,,\n", True, 2, "empty label"),
    "empty label in the middle": (b"1,2,,3\n1,2,,3,,4\n", True, 2, "empty label"),
    "no items": (b"1,2,,3\n,,3\n", True, 2, "got 0 items; expected 2"),
    "empty first item": (b"1,2,,3\n,2,,3\n", True, 2, "empty item id"),
    "only blank lines": (b"\n\r\n\n", False, None, "no rows"),
    "empty file": (b"", False, None, "no rows"),
    "only a byte order mark": (b"\xef\xbb\xbf", False, None, "no rows"),
    "gzip": (b"\x1f\x8b\x08\x00abc", False, None, "gzip"),
    "zip": (b"PK\x03\x04abc", False, None, "zip"),
    "Parquet": (b"PAR1abc", False, None, "got Parquet"),
    "UTF-16": ("1,2\n".encode("utf-16"), False, None, "UTF-16"),
}


@pytest.mark.parametrize("block_bytes", [TINY, 1 << 20])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_file_line_and_reason(tmp_path: Path, name: str, block_bytes: int) -> None:
    content, labels, line, reason = REFUSED[name]
    path = written(tmp_path, content)
    with pytest.raises(DataError) as caught:
        list(read_sequences_csv(path, labels, block_bytes=block_bytes))
    assert caught.value.path == path and caught.value.line == line
    assert reason in caught.value.reason


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), block_bytes=st.sampled_from([5, 32, 1 << 20]))
def test_any_foreign_byte_is_found_in_its_line(tmp_path: Path, data, block_bytes: int) -> None:
    lines = [b"11,22,33"] * data.draw(st.integers(1, 8))
    row = data.draw(st.integers(0, len(lines) - 1))
    at = data.draw(st.integers(0, 7))
    byte = data.draw(st.binary(min_size=1, max_size=1).filter(lambda b: b not in b"0123456789,\r\n"))
    lines[row] = lines[row][:at] + byte + lines[row][at + 1 :]
    path = written(tmp_path, b"\n".join(lines) + b"\n")
    with pytest.raises(DataError) as caught:
        list(read_sequences_csv(path, False, block_bytes=block_bytes))
    assert caught.value.line == row + 1


def test_a_missing_file_and_wrong_options_are_refused_at_the_call(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_sequences_csv(tmp_path / "absent.csv", False)
    path = written(tmp_path, b"1,2\n")
    for options, reason in [
        ({"pad": "right"}, "padding: got"),
        ({"empty_labels": "x"}, "empty labels: got"),
        ({"length": 0}, "length"),
    ]:
        with pytest.raises(DataError, match=reason):
            read_sequences_csv(path, False, **options)
    with pytest.raises(DataError, match="got 2 items; expected 3"):
        list(read_sequences_csv(path, False, length=3))


def test_a_binary_file_without_newlines_is_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teracon_fast.data.published_csv._MAX_LINE_BYTES", 1 << 10)
    path = written(tmp_path, b"1," * 4096)
    with pytest.raises(DataError, match="line of over") as caught:
        list(read_sequences_csv(path, False, block_bytes=256))
    assert caught.value.line == 1
